"""What a pool takes from its query processes, against processes that break the rules."""

import asyncio
import sys
from pathlib import Path

import pytest

from ray_app.service import pool
from ray_app.service.auth import token_digest
from ray_app.service.frames import LENGTHS, MAX_HEADER_BYTES
from ray_app.service.settings import ServiceSettings

SETTINGS = ServiceSettings(store="none", token_sha256=token_digest("x" * 20), max_bytes=1024)


@pytest.mark.parametrize(
    ("header", "body"), [(MAX_HEADER_BYTES + 1, 0), (10, 1024 + pool._BODY_SLACK + 1)]
)
def test_replies_that_are_too_long_end_their_process(
    tmp_path: Path, header: int, body: int
) -> None:
    (tmp_path / "reply").write_bytes(LENGTHS.pack(header, body))

    async def receive() -> None:
        process = pool._Process(SETTINGS)
        script = "import sys, time; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read());"
        process._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script + "sys.stdout.flush(); time.sleep(60)",
            str(tmp_path / "reply"), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        with pytest.raises(EOFError, match="a reply may have"):
            await process._receive()
        assert await asyncio.wait_for(process._process.wait(), 10) == -9

    asyncio.run(receive())


def test_the_bound_of_memory_is_that_of_all_processes() -> None:
    settings = SETTINGS.model_copy(update={"replicas": 2, "slots": 3, "memory_mb": 100})
    assert settings.memory_bound == 2 * 3 * (2 * 100 * 2**20 + 4 * 1024)
