"""Servers and links: published figures with their sources, and what is assumed where none is published."""

from dataclasses import dataclass

READ_FRACTION = 0.8
"""Assumed: plain reads of all cores reach this fraction of the memory's data rate."""

LINK_FRACTION = 0.8
"""Assumed: transfers reach this fraction of a link's data rate, the rest being headers and gaps."""

THREAD_FRACTION = 0.85
"""Assumed: the cores of a socket reach this fraction of their number times the speed of one. Two reach 0.9 or
more here."""

REGION_SECONDS = {"forward": 20e-6, "training": 60e-6}
"""Assumed: a call costs this much more on the threads of a socket, which start and meet several times."""


@dataclass(frozen=True)
class Link:
    """A link: bytes/s in one direction, and seconds of a message (0: contained in what is measured)."""

    name: str
    bandwidth: float
    latency: float
    source: str


LINKS = {
    link.name: link
    for link in (
        Link("100 Gb Ethernet", 12.5e9, 15e-6, "IEEE 802.3ba: 100 Gb/s; latency of TCP: assumed"),
        Link("200 Gb Ethernet", 25e9, 15e-6, "IEEE 802.3bs: 200 Gb/s; latency of TCP: assumed"),
        Link("400 Gb InfiniBand", 50e9, 2e-6, "InfiniBand NDR x4: 400 Gb/s; latency of RDMA: assumed"),
        Link("PCIe 4.0 x16", 31.5e9, 1e-6, "PCI-SIG: 16 GT/s per lane, 128b/130b"),
        Link("PCIe 5.0 x16", 63e9, 1e-6, "PCI-SIG: 32 GT/s per lane, 128b/130b"),
        Link("4 xGMI x16", 256e9, 0.3e-6, "AMD EPYC 9005 Architecture Overview (58462): 32 Gb/s per lane"),
        Link("4 UPI 2.0", 288e9, 0.3e-6, "Intel Xeon 6 with P-cores, product brief: 24 GT/s, 24 lanes"),
        Link("1 UPI 2.0", 72e9, 0.3e-6, "as above; each pair of four sockets has one link"),
    )
}
"""By name. PCIe is what hidden states cross between a GPU and its host."""


@dataclass(frozen=True)
class Socket:
    """A processor: what one core computes relative to the measured one, and the memory's data rate.

    isa: its kernels, whose fractions of the peak are those measured with them. gigahertz: its clock with all
    cores busy, by which the peak is scaled; None: the peak of the machine measured with these kernels.
    bandwidth: bytes/s of all memory channels.
    """

    name: str
    isa: str
    cores: int
    gigahertz: float | None
    bandwidth: float
    source: str


EPYC = Socket("EPYC 9755", "avx512_bf16", 128, 2.7, 12 * 51.2e9,
              "AMD's product page: 128 cores, 2.7 GHz base clock, 12 channels of DDR5-6400")  # fmt: skip
XEON = Socket("Xeon 6788P", "amx_bf16", 86, None, 8 * 51.2e9,
              "Intel's product page: 86 cores, 8 channels of DDR5-6400, up to 8 sockets")  # fmt: skip

FLOPS_PER_CYCLE = {"avx512_bf16": 128}
"""bfloat16 FLOPs of a core of EPYC 9005 in a cycle: two 512-bit products and sums of pairs. Measured here:
530 GFLOP/s, which is 4.1 GHz, its largest clock."""


@dataclass(frozen=True)
class Setup:
    """Sockets in hosts: ``sockets`` in each of ``hosts``, and the links between them."""

    name: str
    socket: Socket
    sockets: int = 1
    hosts: int = 1
    between_sockets: Link = LINKS["4 xGMI x16"]
    between_hosts: Link = LINKS["100 Gb Ethernet"]

    @property
    def ranks(self) -> int:
        """One for each socket."""
        return self.sockets * self.hosts


SETUPS = (
    Setup("1 x EPYC 9755", EPYC),
    Setup("2 x EPYC 9755", EPYC, 2),
    Setup("2 hosts of 1 x EPYC 9755, 100 Gb", EPYC, 1, 2),
    Setup("4 hosts of 1 x EPYC 9755, 100 Gb", EPYC, 1, 4),
    Setup("4 hosts of 2 x EPYC 9755, 400 Gb", EPYC, 2, 4, between_hosts=LINKS["400 Gb InfiniBand"]),
    Setup("1 x Xeon 6788P", XEON, between_sockets=LINKS["4 UPI 2.0"]),
    Setup("2 x Xeon 6788P", XEON, 2, between_sockets=LINKS["4 UPI 2.0"]),
    Setup("4 x Xeon 6788P", XEON, 4, between_sockets=LINKS["1 UPI 2.0"]),
)
