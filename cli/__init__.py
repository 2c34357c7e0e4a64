"""The command tandem: one file a group of verbs, no logic."""
