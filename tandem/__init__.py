"""The vocabulary of Tandem: requests, messages, errors, generated protocol, public client."""
