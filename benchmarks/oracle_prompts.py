"""The 64 English prompts of the equality oracle: text to continue, and questions asked through the chat template."""

from __future__ import annotations

CONTINUE = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "Ingredients: 200 g flour, 3 eggs, half a litre of milk.\nMethod:",
    "In 1969, for the first time, human beings",
    "The mitochondria is the powerhouse of the cell, which means that",
    "1, 1, 2, 3, 5, 8, 13,",
    "Photosynthesis is the process by which plants",
    "It was the best of times, it was the worst of times,",
    "The stock market fell sharply on Monday because",
    "SELECT name, age FROM users WHERE",
    "The main difference between a lake and a pond is",
    "Breaking news: scientists have discovered a new species of",
    "To change a flat tyre, you first need to",
    "Roses are red, violets are blue,",
    "The quick brown fox jumps over the lazy dog. The lazy dog",
    "Water boils at 100 degrees Celsius at sea level, but on a mountain",
    "My grandmother always told me that the secret of a good soup is",
)

QUESTIONS = (
    "What is the capital of Japan?",
    "Explain gravity to a child of six.",
    "Write a haiku about autumn rain.",
    "How many planets are in the solar system? Name them in order.",
    "Give me five tips for sleeping better.",
    "What is the difference between a virus and a bacterium?",
    "Translate 'Good morning, how are you?' into French.",
    "Write a Python function that reverses a string.",
    "Who wrote Pride and Prejudice, and what is it about?",
    "What are the primary colours, and why are they called primary?",
    "Plan a three day trip to Rome for a family with two children.",
    "Why is the sky blue during the day and red at sunset?",
    "List the ingredients of a simple tomato sauce and say how to cook it.",
    "What happens in the body when we are afraid?",
    "Write a short letter to a friend who has moved to another city.",
    "How does a bicycle stay upright when it is moving?",
    "Name three renewable sources of energy with one advantage and one drawback each.",
    "What is machine learning? Answer in two sentences.",
    "Tell me a short story about a robot that learns to paint.",
    "How do I remove a coffee stain from a white shirt?",
    "If a train travels 60 miles in 45 minutes, what is its speed in miles per hour?",
    "What were the main causes of the First World War?",
    "Describe the water cycle step by step.",
    "Give three arguments for and three against working from home.",
)

PASSAGES = (
    "The lighthouse on the northern cape was built in 1847, after a winter in which eleven ships were lost within "
    "sight of the harbour. Its first keeper, a retired sailor named Tobias Wren, lived there for thirty-one years "
    "with his daughter, and kept a diary in which he noted the weather, the birds and every ship that passed. The "
    "diary was found in 1952 under the floor of the lamp room, wrapped in oilcloth. Historians have since used it to "
    "study how the climate of the coast has changed: the first day of frost, which Wren wrote down each autumn, now "
    "comes almost four weeks later than it did then.",
    "Honey bees tell one another where food is by dancing. A forager that has found a rich patch of flowers returns "
    "to the hive and runs in a figure of eight on the vertical comb. In the middle part of the figure she waggles "
    "her body. The angle between that run and the vertical is the angle between the sun and the flowers, and the "
    "longer she waggles, the farther away they are. Karl von Frisch, who read this code in the nineteen-forties, "
    "received a Nobel Prize for it in 1973. Later work with small robots that dance showed that other bees do follow "
    "the directions, though smell helps them at the end.",
    "A company that makes wooden toys has two workshops. The first makes 120 trains a day and employs 8 people; the "
    "second makes 90 trains a day and employs 5 people. Wood for one train costs 2 dollars, paint costs 50 cents, "
    "and a worker is paid 140 dollars a day. Each train is sold to shops for 14 dollars. The owner thinks of closing "
    "one of the two workshops and moving all of the work to the other, which would need three more workers and a "
    "second saw that costs 9,000 dollars. Her brother, who keeps the books, thinks that both should stay open, "
    "because the orders before Christmas are twice those of the summer.",
    "When a computer program needs a piece of memory, it asks the operating system for it, and the operating system "
    "hands out memory in pages, most often of 4,096 bytes. The addresses that the program sees are not the addresses "
    "of the memory chips: a table translates one into the other, page by page, and the processor keeps the "
    "translations that it used last in a small fast store. If a page is not in memory at all, the processor stops "
    "the program, the operating system fetches the page from the disk, and the program goes on as if nothing had "
    "happened, only later. A program that touches many pages in turn, more than there is memory for, spends nearly "
    "all of its time waiting for the disk; this is called thrashing.",
    "Maria had never liked the old piano. It stood in the hall of her aunt's house, brown and out of tune, and as a "
    "child she had been made to practise on it for an hour every Saturday while the other children played outside. "
    "So when the lawyer wrote to her that her aunt had left it to her, together with a sealed envelope, her first "
    "thought was to sell it. The man who came to look at it lifted the lid, pressed a few keys, and then went down "
    "on his knees and shone a lamp inside. He was silent for a long time. 'Where did your aunt get this?' he asked. "
    "Maria did not know. She remembered the envelope, which she had put in a drawer and forgotten, and went upstairs "
    "to find it.",
)

TASKS = (
    "Summarise this text in one sentence.",
    "Which numbers are named in this text, and what do they mean?",
    "Write a title for this text and say why it fits.",
    "Continue this text with one more paragraph in the same style.",
)

SYSTEM = "You are a careful assistant. Answer briefly, and say so when you do not know."


def chats() -> list[list[dict[str, str]]]:
    """The conversations, in order: plain questions first, then a task about each passage."""
    plain = [[{"role": "user", "content": question}] for question in QUESTIONS]
    about = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{task}\n\n{passage}"}]
        for passage in PASSAGES
        for task in TASKS
    ]
    return plain + about
