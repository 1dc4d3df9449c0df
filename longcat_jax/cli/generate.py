"""`longcat generate`: continue a prompt."""

import argparse
import sys
import time

PREFILLS = 3
"""Times that the prompt is timed; a busy machine makes some of them longer."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command's options."""
    parser = subparsers.add_parser(
        "generate", description="Continue a prompt; the speed goes to stderr."
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a training workdir")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to make at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the nucleus; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the prompt with its continuation."""
    from longcat_jax.checkpoint import load
    from longcat_jax.inference.generate import Generation, make_request

    request = make_request(
        load(args.checkpoint),
        [args.prompt],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )

    def timed(limit: int | None) -> tuple[float, Generation]:
        start = time.perf_counter()
        generation = request.run(limit=limit)
        return time.perf_counter() - start, generation

    # The first call compiles, the next ones time the prompt alone; none costs a decoding step.
    first, _ = timed(1)
    prefill = min(timed(1)[0] for _ in range(PREFILLS))
    total, generation = timed(None)
    print(args.prompt + generation.texts[0])
    sys.stdout.flush()
    prompt = int(request.inputs.prompts.segment_ids_BT.sum())
    steps = len(generation.tokens[0]) - 1
    speed = (
        f"{steps / (total - prefill):.0f} tokens/s after it"
        if steps and total > prefill
        else "no step timed"
    )
    print(
        f"prompt of {prompt} tokens and first new token in {prefill * 1e3:.1f} ms; {speed} "
        f"(compilation, {first - prefill:.1f} s, not counted)",
        file=sys.stderr,
    )
