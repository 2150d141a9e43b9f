"""Milliseconds to draw a token for 64 rows on one thread: in pieces that stay in the cache, and from all logits at once.

    python -m benchmarks.sampling

Peaked rows, logits from N(0, 3^2); the best of a few tries. top-p alone looks among the likeliest words first; at once it sorts all.
"""

import time

import torch

from vrpo.functional import sample_tokens, sampling

ROWS, TRIES = 64, 5
VOCABULARIES = (2048, 49_152, 151_936)
WHOLE = 2**40


def milliseconds(logits: torch.Tensor, uniforms: torch.Tensor, *, top_p: float) -> float:
    """The fastest of TRIES draws, CPU time."""
    best = float("inf")
    for _ in range(TRIES):
        started = time.process_time()
        sample_tokens(logits, uniforms, temperature=0.7, top_k=0, top_p=top_p)
        best = min(best, time.process_time() - started)
    return 1e3 * best


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    settings = {"in pieces": (sampling.PIECE["cpu"], sampling.CANDIDATES), "at once": (WHOLE, WHOLE)}
    print("words     top-p   " + "   ".join(settings))
    for words in VOCABULARIES:
        logits = 3 * torch.randn(ROWS, words, generator=generator)
        uniforms = torch.rand(ROWS, generator=generator)
        for top_p in (1.0, 0.9):
            found = []
            for piece, candidates in settings.values():
                sampling.PIECE["cpu"], sampling.CANDIDATES = piece, candidates
                found.append(f"{milliseconds(logits, uniforms, top_p=top_p):7.2f} ms")
            print(f"{words:7,}   {top_p:.1f}   " + "   ".join(found))


if __name__ == "__main__":
    main()
