"""Bytes in units that fit their size."""

MIB, GIB = 2**20, 2**30


def size(num_bytes: float) -> str:
    """Four digits and the binary unit that leaves least zeros: 51.34 GiB, 240.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.4g} TiB"


def table_unit(largest_bytes: float) -> tuple[int, str]:
    """Bytes and name of the unit for a table whose largest figure this is."""
    return (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")
