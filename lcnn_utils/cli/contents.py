"""How JupyterLab, started by ``lcnn lab``, reads and writes notebooks."""

from __future__ import annotations

import platform
from typing import Any

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

VIEW = "application/vnd.jupyter.widget-view+json"
SCRIPT = "application/javascript"  # what `setup` shows


class Contents(AsyncLargeFileManager):
    """Jupyter's own, except that the originals can be run but not changed, and that no view of a widget is stored
    that has a picture or a table beside it: when the notebook is opened again, this is shown. Nor are scripts."""

    def is_writable(self, path: str) -> bool:
        return not path.strip("/").startswith("notebooks/") and super().is_writable(path)

    async def get(self, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        model = await super().get(path, *args, **options)
        if model["type"] == "notebook" and model["content"]:  # or JupyterLab would change this, and want to save it
            model["content"]["metadata"].setdefault("language_info", {})["version"] = platform.python_version()
        return model

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        for cell in model["content"]["cells"] if model["type"] == "notebook" else ():
            if outputs := cell.get("outputs"):
                cell["outputs"] = [output for output in outputs if SCRIPT not in output.get("data", {})]
            for data in (output.get("data", {}) for output in cell.get("outputs", ())):
                if data.keys() & {"text/html", "image/png"}:
                    data.pop(VIEW, None)
        return await super().save(model, path)
