"""What statistics of Mistral 7B cost from 1e6 to 1e12 tokens: the table of docs/scale.md.

python benchmarks/cost_model.py --tokens-per-second 10000
"""

import argparse

NEURONS = 32 * (14_336 + 4_096)
STATS_ROW_BYTES = 72  # As `actlake plan` reckons, measured on SmolLM2.
TOKEN_BYTES = 13 + 7  # A row of tokens, and a token of samples.
RUN_RECORD_BYTES = 441  # Of run.json for each shard: benchmarks/driver_scale.py.
STEPS = [
    (10**6, 1, 1 << 16),
    (10**8, 1, 1 << 20),
    (10**9, 8, 1 << 20),
    (10**10, 64, 1 << 20),
    (10**11, 256, 1 << 22),
    (10**12, 1000, 1 << 20),
    (10**12, 1000, 1 << 24),
]
"""(tokens, GPUs, tokens of a shard)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-second", type=float, default=10_000, help="of one GPU")
    parser.add_argument("--stages", type=int, default=1, help="GPUs that one model is cut over")
    args = parser.parse_args()
    columns = ["tokens", "GPUs", "tokens/shard", "hours", "shards", "files", "stats TB",
               "tokens TB", "run.json MB", "commits/s", "PUT/s", "MB/s"]  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|" + " ---: |" * len(columns))
    for tokens, gpus, shard_tokens in STEPS:
        seconds = tokens / (gpus * args.tokens_per_second)
        shards = -(-tokens // shard_tokens)
        files = shards * (3 + args.stages)  # samples, tokens, commit record; stats of each stage
        stats = shards * NEURONS * STATS_ROW_BYTES
        texts = tokens * TOKEN_BYTES
        row = [f"{tokens:.0e}".replace("+", ""), f"{gpus:,}", f"{shard_tokens:,}",
               f"{seconds / 3600:,.2f}", f"{shards:,}", f"{files:,}", f"{stats / 1e12:,.4f}",
               f"{texts / 1e12:,.5f}", f"{shards * RUN_RECORD_BYTES / 1e6:,.2f}",
               f"{shards / seconds:,.3f}", f"{files / seconds:,.2f}",
               f"{(stats + texts) / seconds / 1e6:,.1f}"]  # fmt: skip
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
