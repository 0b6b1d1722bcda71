"""Metadata of the distribution `jetway`: import names equal folder names, one console script."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.6",
    "numpy>=1.26",
    "deepspeed>=0.19.3",  # 0.18.3 to 0.19.2 computed wrong pipeline gradients under accumulation
    "megatron-core>=0.16.1,<0.17",  # 0.17 needs Python 3.12; 0.16.1 serves 3.10 to 3.13
    "webdataset>=0.2.100",
    "sentencepiece>=0.2.0",
    "ray>=2.30",
    "fsspec>=2024.12",
    "aiohttp>=3.12",
    "aiodns>=3.2",
    "protego>=0.5",
    "wandb>=0.17",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "pillow>=10.3",
    "opencv-python-headless>=4.8",
    "simplejpeg>=1.7",
    "xxhash>=3.4",
    "safetensors>=0.4.3",
    "pyarrow>=15.0",
    "tqdm>=4.66",
    "packaging>=23.0",
]

EXTRAS = {
    "gpu": ["triton>=3.2; platform_system == 'Linux'"],
    "s3": ["s3fs>=2024.12", "obstore>=0.12; python_version >= '3.11'"],  # obstore: there is none of that age for 3.10, where s3fs serves
    "language": ["py3langid>=0.4"],
    "demo": ["scikit-learn>=1.4"],
    "peers": ["scikit-learn>=1.4", "scikit-image>=0.22"],  # photographs for the benchmark; what would clash: tests/peers/environments.py
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "ruff>=0.9",
        "mypy>=1.11",
        "types-PyYAML",
        "types-tqdm",
        "aiobotocore>=2.19",  # of s3fs; named before moto, whose boto3 it limits: pip on its own tries every s3fs instead, for ever
        "moto[server]>=5.0",
        "s3fs>=2024.12",
        "obstore>=0.12; python_version >= '3.11'",
        "scikit-learn>=1.4",
        "scikit-image>=0.22",
        "imagehash>=4.3",
        "datasketch>=1.6",
        "py3langid>=0.4",
        "psutil>=5.9",
        "triton>=3.2; platform_system == 'Linux'",  # its interpreter runs the kernels in the default tests
    ],
}

setup(
    name="jetway",
    version="0.1.0",
    description="Pretrain JetFormer, one autoregressive model over text and raw pixels, from a laptop CPU to a SLURM cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["configs*", "data_prep*", "launch*", "model*", "pipeline*"]),
    package_data={"configs": ["**/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jetway=launch.cli:main"]},
)
