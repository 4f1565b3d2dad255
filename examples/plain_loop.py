"""An engine without a thread of its own, in the host's loop: python examples/plain_loop.py MODEL IMAGE QUESTION..."""

from __future__ import annotations

import argparse

import llava_fast as lf


def ask(engine: lf.Engine, image: str, question: str) -> lf.Handle:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    request = lf.Request(messages=[{"role": "user", "content": parts}], sampling=lf.SamplingParams(max_tokens=32))
    return engine.submit(request)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about an image, one engine step at a time.")
    parser.add_argument("model", help="LLaVA directory or hub id")
    parser.add_argument("image")
    parser.add_argument("questions", nargs="+", help="all are worked on together")
    args = parser.parse_args()

    model, processor = lf.load(args.model)
    with lf.Engine(model, processor, lf.EngineConfig(max_sequences=8), background=False) as engine:
        open_questions = {question: ask(engine, args.image, question) for question in args.questions}
        steps = 0
        while open_questions:
            engine.step()  # nothing runs but here
            steps += 1  # here the host does work of its own: a frame of a game, a sensor's reading
            for question, handle in list(open_questions.items()):
                if handle.done:
                    del open_questions[question]
                    print_answer(question, handle, steps)


def print_answer(question: str, handle: lf.Handle, steps: int) -> None:
    try:
        print(f"{question} {handle.result().text!r} (after {steps} steps)")
    except lf.errors.LlavaError as error:  # this question only; the others go on
        print(f"{question} failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
