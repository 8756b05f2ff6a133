"""Raw values that are kept are those of the hooks, whatever the shards and stages."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.stage import build_stage
from ray_app.capture.values import ValuesMemory, ValuesRecorder, draw_positions
from ray_app.capture.workers import LocalWorkers
from ray_app.cli import cli
from ray_app.progress import NoProgress
from ray_app.run import Run
from storage import verify_store
from storage.values import Encoding


def matrix_of(run: Run, **place: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, neurons) values in the order of computation, and their samples and positions."""
    blocks = list(run.store.matrix_blocks(**place, max_bytes=1 << 12))
    assert max(block.values.nbytes for block in blocks) <= 1 << 12
    values = np.concatenate([block.values for block in blocks])
    np.testing.assert_array_equal(values, run.store.matrix(**place))
    chosen = [5, 2]
    np.testing.assert_array_equal(values[:, chosen], run.store.matrix(**place, neurons=chosen))
    sample, position = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("sample", "position")
    )
    return values, sample, position


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_values_are_those_of_the_hooks(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
    text_folder: Path,
    encoding: str,
) -> None:
    tasks = {"code": {"files": f"{text_folder}/code/*.txt"}}
    study = write_study(tasks=tasks, reference=None)
    run = capture_locally(study, None, f"capture.values={{encoding: {encoding}}}")
    assert verify_store(run.store).problems == []
    for task, reference in reference_of(run, one_by_one=False).items():
        for site, layer in [("attn", 0), ("mlp", 1)]:
            z = torch.cat(reference.activations[site, layer])
            place = {"task": task, "site": site, "layer": layer}
            found, sample, position = matrix_of(run, **place)
            rows = run.store.sql(
                "select value from activations where task = $task and site = $site "
                "and layer = $layer order by sample, position, neuron",
                place,
            ).fetchnumpy()
            in_order = found[np.lexsort((position, sample))]
            np.testing.assert_array_equal(rows["value"].reshape(found.shape), in_order)
            found = found[
                np.concatenate([np.flatnonzero(sample == one) for one in reference.num_counted])
            ]
            error = run.store.sql(
                "select neuron, max(error_bound) as error from values where task = $task "
                "and site = $site and layer = $layer group by neuron order by neuron",
                place,
            ).fetchnumpy()["error"]
            off = np.abs(found.astype(np.float64) - z.double().numpy())
            assert (off <= error).all()
            if encoding == "float32":
                assert not off.any()
            elif encoding == "float16":
                np.testing.assert_array_equal(found, z.half().float().numpy())
            else:
                steps = np.abs(z.numpy()).max(0) / 127
                assert (error <= 0.501 * steps).all()
                assert off.max() > 0


def test_the_export_command_writes_the_neurons_that_it_is_asked_for(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], tmp_path: Path
) -> None:
    run = capture_locally(write_study(), None, "capture.values={layers: [1]}")
    output = tmp_path / "values.parquet"
    place = ["--site", "mlp", "--layer", "1", "--task", "code", "--output", str(output)]
    done = CliRunner().invoke(cli, ["export", run.store.files.root, *place, "--neurons", "4-6,2"])
    assert done.output == f"160 positions x 4 neurons in {output}\n"
    found = pq.read_table(output)["activations"].combine_chunks().flatten().to_numpy()
    expected = run.store.matrix("mlp", 1, "code", neurons=[4, 5, 6, 2])
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


def test_stages_and_kernels_write_the_same_files(
    write_study: Callable[..., Path], begin_locally: Callable[..., Run], tmp_path: Path
) -> None:
    study = write_study(resources={"stages": 2})
    chosen = "capture.values={share: 0.4, sites: [mlp], tasks: [code, mixed], encoding: int8}"
    found = []
    for name, cut, reduction in [
        ("whole", [range(2)], "eager"),
        ("cut", [range(1), range(1, 2)], "eager"),
        ("compiled", [range(1), range(1, 2)], "compiled"),
    ]:
        run = begin_locally(study, tmp_path / name, chosen)
        run.record["reduction"] = reduction
        workers = LocalWorkers(*[build_stage(spec) for spec in run.stage_specs(cut)])
        driver.capture(run, workers, NoProgress())
        files = run.store.files
        paths = files.list("runs/*/value*/**/*.parquet")
        found.append({path: files.sha256(path) for path in paths})
    shards = [shard for shard in run.shards if shard.task in ("code", "mixed")]
    assert len(found[0]) == len(shards) * 2 < 2 * len(run.shards)
    assert found[0] == found[1] == found[2]
    kept = run.store.sql(
        "select task, count(*), 160 from values where site = 'mlp' and layer = 0 and neuron = 0 "
        "group by task order by task"
    ).fetchall()
    assert [row[0] for row in kept] == ["code", "mixed"]
    assert all(0.25 < row[1] / row[2] < 0.55 for row in kept)
    assert run.store.sql("select distinct site, layer from values order by all").fetchall() == [
        ("mlp", 0), ("mlp", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_batches_of_any_shape_are_turned_round(dtype: torch.dtype, encoding: Encoding) -> None:
    """By the kernel, against torch; among the numbers are ties and subnormal ones of rounding."""
    generator = torch.Generator().manual_seed(0)
    shard: Any = SimpleNamespace(shard=0, task="code")
    for width, *sizes in [(1, 1, 2), (31, 64, 1), (32, 63, 65), (33, 130, 64), (100, 7, 200)]:
        whole = torch.randn(sum(sizes), width + 3, generator=generator)
        whole *= 2.0 ** torch.randint(-26, 13, whole.shape, generator=generator)
        whole[::2] = (whole[::2] * 2**10).round() / 2**10 + 2.0**-11
        z = whole.to(dtype)[:, 1 : width + 1]  # Rows are farther apart than they are long.
        batches = list(z.split(sizes))
        kept = [torch.randperm(len(part), generator=generator)[::2].sort()[0] for part in batches]
        site: Any = SimpleNamespace(site="mlp", layer=0, width=width, head_dim=None)
        for rows in ([None] * len(sizes), kept):
            parts = [
                part if some is None else part[some]
                for part, some in zip(batches, rows, strict=True)
            ]
            expected = torch.cat(parts).to(getattr(torch, encoding)).T
            chosen: Any = ChosenBefore(expected.shape[1], parts, rows)
            recorder = ValuesRecorder(
                shard, [site], chosen, encoding, "compiled", memory=ValuesMemory()
            )
            for index, part in enumerate(batches):
                recorder.add(index, site, part)  # type: ignore[arg-type]
            (written,) = recorder.parts()
            found = pa.Table.from_batches(written.rows)["value"].combine_chunks().flatten()
            # By their bits, which tell -0 from 0.
            assert found.to_numpy().tobytes() == expected.numpy().tobytes()


class ChosenBefore:
    """Positions of batches, chosen already; in the place of `ChosenPositions`."""

    def __init__(self, count: int, parts: list[torch.Tensor], rows: list[Any]) -> None:
        self.count = count
        self._starts = np.cumsum([0, *map(len, parts)])
        self._rows = rows

    def of(self, batch: int) -> tuple[int, torch.Tensor | None]:
        return int(self._starts[batch]), self._rows[batch]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        places = np.arange(self.count, dtype=np.int32)
        return places, places


def test_memory_is_used_again_once_it_is_given_back() -> None:
    memory = ValuesMemory()

    def place(rows: int, columns: int) -> int:
        return memory.take(rows, columns, torch.float16).data_ptr()

    short, long = (memory.take(3, length, torch.float16) for length in (1000, 9000))
    short[:], long[:] = 1, 2
    assert short.unique() == 1
    assert long.unique() == 2
    memory.give(long)
    memory.give(short)
    # The smallest that fits, with a little room for shards that are longer; apart by rows.
    assert place(3, 1100) == short.data_ptr()
    assert place(2, 1000) not in {short.data_ptr(), long.data_ptr()}
    assert place(3, 1000) == long.data_ptr()
    memory.give(short)
    memory.give(long)
    # Where nothing fits, the smallest is let go for what is made.
    wide = memory.take(3, 20_000, torch.float32)
    assert wide.dtype == torch.float32
    assert wide.shape == (3, 20_000)
    assert place(3, 1000) == long.data_ptr()
    assert memory.take(4, 0, torch.float16).shape == (4, 0)


def test_values_that_are_being_written_are_not_overwritten_by_the_next_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.values._GROUP_VALUES", 64)
    memory = ValuesMemory()
    shard: Any = SimpleNamespace(shard=0, task="code")
    site: Any = SimpleNamespace(site="mlp", layer=0, width=8, head_dim=None)

    def recorded(number: float) -> ValuesRecorder:
        z = torch.full((64, 8), number)
        chosen: Any = ChosenBefore(64, [z], [None])
        recorder = ValuesRecorder(shard, [site], chosen, "float16", "compiled", memory=memory)
        recorder.add(0, site, z)  # type: ignore[arg-type]
        return recorder

    def numbers(groups: Iterable[pa.RecordBatch]) -> set[float]:
        return {value for group in groups for value in group["value"].flatten().to_pylist()}

    (first,) = recorded(1).parts()
    groups = iter(first.rows)
    assert numbers([next(groups)]) == {1}
    second = recorded(2)  # A stage computes it while the first is written.
    assert numbers(groups) == {1}
    third = recorded(3)
    (part,) = second.parts()
    assert numbers(part.rows) == {2}
    (part,) = third.parts()
    assert numbers(part.rows) == {3}
    # Two shards were held at once at most.
    assert sum(map(len, memory._free.values())) == 2


def test_sites_of_other_widths_and_heads_do_not_share_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.values._GROUP_VALUES", 40)
    kinds = [(12, None), (12, 4), (12, 3), (7, None), (8, 4), (12, 4)]
    sites: Any = [
        SimpleNamespace(site="attn", layer=layer, width=width, head_dim=head_dim)
        for layer, (width, head_dim) in enumerate(kinds)
    ]
    shard: Any = SimpleNamespace(shard=0, task="code")
    z = {site.layer: torch.randn(5, site.width) for site in sites}
    chosen: Any = ChosenBefore(0, [z[0]], [None])
    chosen.count = 5
    recorder = ValuesRecorder(shard, sites, chosen, "float32", "eager", memory=ValuesMemory())
    for site in sites:
        recorder.add(0, site, z[site.layer])  # type: ignore[arg-type]
    for part, (width, head_dim) in zip(recorder.parts(), kinds, strict=True):
        assert part.site is not None
        groups = pa.Table.from_batches(part.rows)
        neurons = list(range(width))
        assert groups["neuron"].to_pylist() == neurons
        heads = [None if head_dim is None else neuron // head_dim for neuron in neurons]
        assert groups["head"].to_pylist() == heads
        np.testing.assert_array_equal(groups["value"].to_pylist(), z[part.site[1]].T)


def test_each_position_is_drawn_for_itself() -> None:
    sample, position = (axis.ravel() for axis in np.mgrid[:300, :400].astype(np.int32))
    drawn = draw_positions(sample, position, seed=3, task="code", share=0.25)
    assert abs(drawn.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(drawn))
    # Neighbours, rows and columns are independent of one another.
    table = drawn.reshape(300, 400)
    for pair in (table[1:] & table[:-1], table[:, 1:] & table[:, :-1]):
        assert abs(pair.mean() - 0.25**2) < 0.004
    assert table.mean(0).std() < 0.035
    assert table.mean(1).std() < 0.031
    order = np.random.default_rng(0).permutation(len(sample))[:1000]
    some = draw_positions(sample[order], position[order], seed=3, task="code", share=0.25)
    np.testing.assert_array_equal(some, drawn[order])
    for other in ({"seed": 4}, {"task": "prose"}):
        again = draw_positions(sample, position, **{"seed": 3, "task": "code", **other}, share=0.25)
        assert abs((again & drawn).mean() - 0.25**2) < 0.004


def test_half_precision_that_is_too_narrow_is_refused_and_leaves_no_infinity(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = ValuesRecorder.add

    def add_large(self: Any, batch: Any, site: Any, z: torch.Tensor) -> None:
        z = z.clone()
        if site.site == "mlp":
            z[:, 5] = 65_520.0
        add(self, batch, site, z)

    monkeypatch.setattr(ValuesRecorder, "add", add_large)
    with pytest.raises(CaptureError) as refused:
        capture_locally(write_study(), None, "capture.values={}")
    assert str(refused.value) == (
        "neuron 5 of site 'mlp', layer 0, in shard 0 of task 'code' is larger than 65,504, the "
        "largest number of capture.values.encoding: float16; set it to float32 or int8, and pass "
        "--new-run."
    )
