"""The name under which results of a machine are kept."""

import pytest

from bench import machine, results

CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\nmodel name\t: {}\n"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "file"),
    [
        ("AuthenticAMD", 25, "AMD EPYC", "AMD EPYC family 25", "run-amd-epyc-family-25-2threads-avx2.json"),
        ("AuthenticAMD", 26, "AMD EPYC", "AMD EPYC family 26", "run-amd-epyc-family-26-2threads-avx2.json"),
        (
            "AuthenticAMD",
            25,
            "AMD EPYC 9654 96-Core Processor",
            "AMD EPYC 9654 96-Core Processor",
            "run-amd-epyc-9654-96-core-processor-2threads-avx2.json",
        ),
        (
            "GenuineIntel",
            6,
            "Intel(R) Xeon(R) Processor",
            "Intel(R) Xeon(R) Processor",
            "run-intel-xeon-processor-2threads-avx2.json",
        ),
    ],
)
def test_machines_that_differ_have_files_of_their_own(monkeypatch, vendor, family, model, name, file):
    monkeypatch.setattr(machine.Path, "read_text", lambda _: CPUINFO.format(vendor, family, model))
    assert machine.cpu_model() == name
    assert results.result_file("run", {"cpu": name, "threads": 2}, "avx2").name == file
