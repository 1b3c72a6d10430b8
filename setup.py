"""Which folders become packages? Everything under `tinybp_lightning/`, and `conf/` as `tinybp_lightning.conf`.

All metadata is in `pyproject.toml`. Only this list is computed here, because setuptools' declarative discovery cannot
place a folder under another package's name; a new folder in `conf/` is picked up without touching any list.
"""

from setuptools import find_namespace_packages, find_packages, setup

_CONF = "tinybp_lightning.conf"
_conf_groups = find_namespace_packages("conf", exclude=["*__pycache__*"])

setup(
    packages=[
        *find_packages(include=["tinybp_lightning", "tinybp_lightning.*"], exclude=[_CONF, f"{_CONF}.*"]),
        _CONF,
        *(f"{_CONF}.{group}" for group in _conf_groups),
    ],
    package_dir={_CONF: "conf"},
    package_data={"tinybp_lightning": ["py.typed"], _CONF: ["**/*.yaml"]},
)
