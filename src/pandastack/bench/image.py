"""The image that the bare tools start from: that of our own sandboxes."""

from __future__ import annotations

from pandastack.errors import HostUnfit
from pandastack.host import app as host_app
from pandastack.host.settings import HostSettings
from pandastack.host.storage.images import Image, Images


def image_of(template: str, settings: HostSettings) -> Image:
    """Raises HostUnfit where it was not built."""
    folders = [host_app.shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])]
    image = Images(settings.cache_dir / "images", folders).cached(template)
    if image is None:
        raise HostUnfit("there is no image to compare with", hint=f"run `pandastack template bake {template}` first")
    return image
