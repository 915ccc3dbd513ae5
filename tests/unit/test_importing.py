"""What ranks start with: imports without the garbage collector, and without torch's compiler."""

import gc
import subprocess
import sys
from contextlib import suppress

import pytest

from megacode.importing import uncollected


@pytest.fixture
def collector():
    """The garbage collector as it was."""
    before = gc.isenabled()
    yield
    gc.freeze()
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_collected_and_what_is_there_stays(collector, before):
    (gc.enable if before else gc.disable)()
    gc.unfreeze()
    with suppress(ImportError), uncollected():
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
        raise ImportError
    assert gc.isenabled() is before
    assert gc.get_freeze_count() > 10_000


def test_an_engine_does_not_need_torchs_compiler():
    """DeepSpeed imports Muon with each, which imports the compiler unless it is imported plainly before."""
    code = (
        "import sys; from megacode.engine import private; private.import_muon_plainly(); "
        "from deepspeed.runtime import compiler; from deepspeed.runtime.zero.muon import original_muon; "
        "assert not {'torch._inductor.compile_fx'} & set(sys.modules); "
        "assert compiler.compile.__name__ == 'compile'; "
        "assert original_muon.zeropower_via_newtonschulz5.__module__.endswith('original_muon')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
