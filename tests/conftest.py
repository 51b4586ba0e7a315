"""Which devices and backends the tests run on, and the state that every test starts from and leaves behind.

A test with a ``backend`` argument runs for every backend that serves its module's ``OP`` on this machine, and for None
(the op chooses) on the devices in its module's ``UNNAMED``. Triton's kernels run on a CPU under its interpreter alone,
which TRITON_INTERPRET=1 asks for before it is imported: a session with it is about them and nothing else, one without
it is about all the rest.
"""

import os
import pathlib
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

import widenet_kernels as wk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


if INTERPRETED:
    import interpreted

    interpreted.install()


def backends(op: str, device: str) -> list[str]:
    """What is available, and "native" wherever it was built: what cannot be loaded or used fails, not vanishes."""
    names = list(wk.available_backends(op, device))
    info = wk.build_info()
    built = op in info["native_ops"].get(device, ()) or (device == "cpu" and info["library"] is not None)
    if built and "native" not in names:
        names.insert(0, "native")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in ("device", "backend") if name in metafunc.fixturenames]
    if not names:
        return
    op = getattr(metafunc.module, "OP", "moe_ffn")
    cases = []
    for device in DEVICES:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if "backend" not in names:
            cases.append(pytest.param(device, id=device, marks=marks))
            continue
        unnamed = [None] if device in getattr(metafunc.module, "UNNAMED", ()) else []
        for backend in backends(op, device) + unnamed:
            values = (device, backend) if "device" in names else (backend,)
            cases.append(pytest.param(*values, id=f"{device}-{backend}", marks=marks))
        if "device" not in names:
            break
    metafunc.parametrize(names, cases)


# What the interpreter is not asked, for it takes minutes: the modules and models, which call the same ops; what differs
# by threads, which it has not; and, beside the oracle, the shapes of very many tokens or experts in every dtype.
OVERLONG = (
    "tests/nn/",
    "tests/models/",
    "number_of_threads",
    "small_experts",
    "-T156-",
    "-T5000-",
    "-T65600-",
    "as_good_as_torch[cpu-triton-T5-D4-",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def interpreted(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        on_cpu_triton = values.get("backend") == "triton" and values.get("device", "cpu") == "cpu"
        return on_cpu_triton or item.get_closest_marker("interpreted") is not None

    def wanted(item: pytest.Item) -> bool:
        overlong = INTERPRETED and any(part in item.nodeid for part in OVERLONG)
        return interpreted(item) == INTERPRETED and not overlong

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """A fixed seed; memory from torch.empty full of NaN, so that what a kernel forgets to write is seen, and none that
    an earlier test has used; one thread.

    The cases are small, and threads that wait for each other on a busy machine take longer than the work.
    """
    torch.manual_seed(0)
    wk.empty_cache()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def several_threads(state: None) -> None:
    """For the cases that are long enough to be shared out."""
    torch.set_num_threads(3)


@pytest.fixture
def process_group(tmp_path: pathlib.Path) -> Iterator[None]:
    """Of this process alone."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "compile" in request.node.nodeid:
        torch.compiler.reset()
