"""Make ddpm_jax/data/packaged/fashion_mnist_10k.npz from the original IDX files of Fashion-MNIST's test set.

    python scripts/make_fashion_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz

The two files are published at github.com/zalandoresearch/fashion-mnist and in Debian's package dataset-fashion-mnist
(/usr/share/datasets/fashion-mnist). Pixels and labels are kept as they are; only the container changes, and the same
input gives the same bytes.
"""

import argparse
import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).parents[1] / "ddpm_jax" / "data" / "packaged" / "fashion_mnist_10k.npz"


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: two zero bytes, type 8, the number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    zeros, kind, num_axes = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != 8:
        raise SystemExit(f"{path} is not an IDX file of bytes")
    shape = struct.unpack(f">{num_axes}I", content[4 : 4 + 4 * num_axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed .npz whose bytes depend on the arrays alone: no time stamps."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    """Read the two files named on the command line and write the packaged one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    write_npz(args.out, {"images": read_idx(args.images), "labels": read_idx(args.labels)})
    print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
