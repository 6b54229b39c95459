"""Kinds of picture and video files: what they may be called, and how their first bytes tell them apart."""

PICTURE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
"""Extensions of pictures and what has to be in them."""
VIDEO_FORMATS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska", "mov": "mp4", "avi": "avi"}
"""Extensions of videos and the container they name; .mov and .mp4 are one family, and so are .webm and .mkv."""


def picture_format(data: bytes) -> str | None:
    """JPEG, PNG, WEBP or GIF by a file's first bytes, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if data.startswith((b"GIF87a", b"GIF89a")) else None


def container(data: bytes) -> str | None:
    """mp4, matroska or avi by a file's first bytes, or None."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):  # old .mov files lack ftyp
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return "avi" if data.startswith(b"RIFF") and data[8:12] == b"AVI " else None
