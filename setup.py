"""Where the packages lie: everything else is in pyproject.toml.

kernels/ is a second root, without an __init__.py of its own (a top-level package called ``kernels`` would hide
another library's). conf/ and scripts/ are installed as titanfunc.conf and titanfunc.scripts, so that an
installed wheel trains from any directory.
"""

from setuptools import find_namespace_packages, find_packages, setup

conf = ["titanfunc.conf", *(f"titanfunc.conf.{name}" for name in find_namespace_packages("conf"))]

setup(
    packages=[
        *find_packages(include=["titanfunc", "titanfunc.*"]),
        *find_packages("kernels"),
        "titanfunc.scripts",
        *conf,
    ],
    package_dir={
        "titanfunc_kernels": "kernels/titanfunc_kernels",
        "titanfunc.scripts": "scripts",
        "titanfunc.conf": "conf",
    },
    package_data={name: ["*.yaml"] for name in conf},
)
