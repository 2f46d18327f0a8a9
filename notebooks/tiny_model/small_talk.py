"""What the bundled checkpoint says to greetings, and to questions it was never taught."""

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello.",
            "Hi!",
            "Hello there.",
            "Hey.",
            "Good morning.",
            "Good evening.",
            "Hi there!",
        ),
        "Hello. Ask me about inference engines, or ask me for a story.",
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?"),
        "I am small but well. What would you like to know?",
    ),
    (
        (
            "What can you do?",
            "What can I ask you?",
            "How can you help me?",
            "What do you know?",
            "Help.",
            "What are you good at?",
        ),
        "I can explain the parts of an inference engine, tell a short story, and repeat words.",
    ),
    (
        (
            "Thank you.",
            "Thanks!",
            "Thank you very much.",
            "Great, thanks.",
            "That was helpful.",
        ),
        "You are welcome.",
    ),
    (
        ("Goodbye.", "Bye!", "See you.", "Good night.", "That is all for today."),
        "Goodbye, and come back soon.",
    ),
    (
        ("Can you hear me?", "Are you there?", "Is anybody there?", "Are you awake?"),
        "Yes, I am here. Ask me something.",
    ),
    (
        (
            "Are you a person?",
            "Are you human?",
            "Are you a real person?",
            "Are you alive?",
        ),
        "No, I am a small language model with three million parameters.",
    ),
)

UNKNOWN_ANSWER = (
    "I do not know that. I was only taught about inference engines and stories."
)

UNKNOWN: tuple[str, ...] = (
    "What is the capital of France?",
    "What is the capital of China?",
    "How far away is the moon?",
    "How old is the earth?",
    "Who wrote Hamlet?",
    "Who painted the Mona Lisa?",
    "Who was the first person on the moon?",
    "What is the weather like today?",
    "Will it rain tomorrow?",
    "How do I cook rice?",
    "How do I bake bread?",
    "What should I eat tonight?",
    "What time is it?",
    "What day is today?",
    "How tall is the highest mountain?",
    "Which river is the longest?",
    "Who is the president?",
    "Who won the football match?",
    "What is the meaning of life?",
    "What is two plus two?",
    "What is 17 times 24?",
    "Solve this equation for x.",
    "Translate this into German.",
    "How do you say hello in Spanish?",
    "Write a poem about the sea.",
    "Write a Python program that sorts a list.",
    "How does a car engine work?",
    "Why is the sky blue?",
    "Why do cats purr?",
    "How many legs has a spider?",
    "What is photosynthesis?",
    "What is gravity?",
    "Where can I buy a bicycle?",
    "Where is the next station?",
    "Can you book a flight for me?",
    "Which film should I watch?",
    "What is your favourite colour?",
    "How do planes fly?",
    "What do bees eat?",
    "How much does a house cost?",
)
