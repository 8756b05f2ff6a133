"""Settings of the service, which every replica is given."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ServiceSettings"]


class ServiceSettings(BaseModel):
    """What `actlake serve` and a Serve config file decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str = Field(description="Folder or URL (s3://bucket/prefix) of the store.")
    token_sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the token in hexadecimal: replicas check tokens, and hold none.",
    )
    studies: Path | None = Field(
        None,
        description="Folder of the study files that jobs may be started for; no jobs if not given.",
    )
    job_folder: Path | None = Field(
        None, description="Folder that jobs run in, from which paths of studies are relative."
    )
    hosts: list[str] = Field(
        ["127.0.0.1", "localhost", "[::1]"],
        min_length=1,
        description="Names that the header Host may carry, without port: those by which the "
        "service is reached. '*' allows any, which only a proxy that checks it should be told.",
    )
    replicas: int = Field(1, ge=1, description="Copies of the service that share the requests.")
    slots: int = Field(
        4,
        ge=1,
        description="Queries of a replica that run at a time, each in a process of its own.",
    )
    threads: int = Field(1, ge=1, description="Threads of one query.")
    memory_mb: int = Field(
        1024,
        ge=64,
        description="MiB that DuckDB may use for one query. Its process may take twice that and "
        "4 x max_bytes, so all of them are bounded by replicas x slots x (2 x memory_mb + 4 x "
        "max_bytes).",
    )
    max_waiting: int = Field(
        256,
        ge=0,
        description="Requests of a replica that may wait for a slot; one more is refused with 503.",
    )
    max_wait_seconds: float = Field(
        60, gt=0, description="Longest that a request waits for a slot; then it gets 503."
    )
    max_seconds: float = Field(
        120, gt=0, description="Longest time limit that a query can be given."
    )
    max_rows: int = Field(1_000_000, ge=1, description="Most rows of one answer.")
    max_bytes: int = Field(
        32 << 20, ge=1024, description="Most bytes of one answer, names and types included."
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Most bytes of a request.")
    freshness_seconds: Annotated[float, Field(ge=0)] = Field(
        1.0, description="How long a query may take the list of committed files for current."
    )

    @property
    def process_bytes(self) -> int:
        """Bytes that a query process may take beyond what it has when it is idle."""
        return 2 * (self.memory_mb << 20) + 4 * self.max_bytes

    @property
    def memory_bound(self) -> int:
        """Bytes that the query processes of all replicas may take together."""
        return self.replicas * self.slots * self.process_bytes
