"""Every compiled kernel of the package, as a release carries it. Built in the user's cache, as other tests use it."""

from __future__ import annotations

import re

import pytest

from kernels.toolchain import build_all
from kernels.toolchain.report import BuildReport, table
from kernels.toolchain.sources import host_target, known_isas
from kernels.toolchain.tools import ARCHITECTURES, cuobjdump


@pytest.fixture(scope="module")
def reports() -> dict[str, BuildReport]:
    found = build_all()
    print(table(found))
    return {report.target: report for report in found}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", [*map(host_target, known_isas()), *ARCHITECTURES])
def test_every_kernel_compiles_without_a_warning_and_no_loop_touches_local_memory(
    target: str, reports: dict[str, BuildReport]
) -> None:
    report = reports[target]
    if report.library is None:
        pytest.skip(report.reason)
    # That this ptxas is known to be wrong on some targets is told where kernels run, and is no fault of theirs.
    assert [warning for warning in report.warnings if "known wrong code" not in warning] == []
    assert report.failures == []


#: Machine code of a warpgroup's product, of a copy by boxes, and of a plain bulk copy.
HOPPER = {"HGMMA", "UTMALDG", "UBLKCP"}


@pytest.mark.timeout(1200)
def test_every_kind_of_kernel_has_its_instructions_and_no_other_kinds(reports: dict[str, BuildReport]) -> None:
    report = reports["sm_90a"]
    code = cuobjdump("-sass", str(report.library)) if report.library else None
    if code is None:
        pytest.skip(report.reason or "no cuobjdump and nvdisasm (pip install 'stoker[native]')")
    parts = re.split(r"^\s*Function : (\S+)$", code, flags=re.M)[1:]
    used = {symbol: HOPPER & {*re.findall(r"[A-Z]+", text)} for symbol, text in zip(parts[::2], parts[1::2])}
    names = {kernel.symbol: kernel.name for kernel in report.kernels}
    seen = set()
    for symbol, found in used.items():
        kind, _, kernel = names[symbol].removeprefix("stoker::").partition("::")
        scan = kernel.startswith(("forward", "backward", "kda_forward", "kda_backward", "kda_pairs"))
        expected = {"hopper": HOPPER, "wgmma": {"HGMMA"}}.get(kind, set())
        if scan:
            assert found == expected, names[symbol]
            seen.add(kind)
        elif "prepare" in kernel:
            assert found <= expected and ("UTMALDG" in found) == (kind == "hopper"), names[symbol]
        else:
            assert not found, names[symbol]
    assert seen == {"cuda", "hopper", "wgmma"}
