"""python -m lhruntime DIR --prompt TEXT: streams what the model writes after the prompt."""

from __future__ import annotations

import argparse
import io
import sys

from lhruntime.errors import LhruntimeError
from lhruntime.session import Session

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for the user's mistake."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        _stream(options)
    except LhruntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m lhruntime", description=about)
    parser.add_argument("directory", metavar="DIR", help="a directory built by lhcompile")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    return parser


def _stream(options: argparse.Namespace) -> None:
    session = Session.load(options.directory, threads=options.threads)
    decoder = session.tokenizer.stream()
    tokens = session.generate(
        session.tokenizer.encode(options.prompt),
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for token in tokens:
        print(decoder.feed(int(token[0])), end="", flush=True)
    print(decoder.finish())


if __name__ == "__main__":
    sys.exit(main())
