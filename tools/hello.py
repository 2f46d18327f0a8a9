"""Let the bundled model tell a story, token by token: the first thing `make run` shows."""

from folo_lib import LLMEngine, SamplingParams, bundled_model_path

PROMPT = "Once upon a time"


def main() -> None:
    engine = LLMEngine(bundled_model_path(), use_tqdm=False)
    print("\nThe course's own Qwen3 says:\n")
    print(PROMPT, end="")
    shown = 0
    for output in engine.stream(PROMPT, SamplingParams(temperature=0, max_tokens=200)):
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print("\n")


if __name__ == "__main__":
    main()
