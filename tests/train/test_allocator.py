import platform
import subprocess
import sys

import pytest

# Page faults of 20 tensors of 64 MB, one after the other, once the first have come and gone.
PROGRAM = """
import resource, torch
from train.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(2):
    before = faults()
    for _ in range(20):
        torch.ones(1 << 24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_tensors_are_made_from_the_memory_of_those_before():
    def page_faults(keep):
        program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)

    # With huge pages, one fault may bring in 2 MB.
    assert page_faults(keep=False) > 20 * 16
    assert page_faults(keep=True) < 20
