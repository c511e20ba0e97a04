"""What `pip install .` and the wheel hold: the package `selfplay`, and in selfplay/rooms the rooms and deploy/ as they
lie here. Everything else about the package is in pyproject.toml; selfplay/__init__.py says how the rooms are imported.
"""

from setuptools import find_packages, setup

ROOMS = ("data_contracts", "stages", "tasks", "flows")
FILES_BESIDE_CODE = ["*.md", "*.json", "*.jsonl", "*.jinja", "*.css", "*.yaml"]
BROUGHT = ["runs/**/*.yaml", "prompts/*", "evals/**/*"]
"""Of deploy/: what a run reads. Set-up, locks, images and cluster files belong to a checkout."""

setup(
    packages=[
        "selfplay",
        *(f"selfplay.rooms.{name}" for name in find_packages(include=[f"{room}*" for room in ROOMS])),
        "selfplay.rooms.deploy",
    ],
    package_dir={f"selfplay.rooms.{name}": name for name in (*ROOMS, "deploy")},
    package_data={"selfplay.rooms.deploy": BROUGHT, "": FILES_BESIDE_CODE},
    include_package_data=False,
)
