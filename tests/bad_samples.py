"""Samples with one fault each. `bad_inputs.py` writes them into shards."""

import json
from dataclasses import dataclass
from typing import Any

import media

from emu2_megatron.data.shards import RawSample

EMPTY = "file is empty"
EXTENSION = "file does not match its extension"
PICTURE = "picture is cut off or damaged"
LARGE = "picture is too large"
ASPECT = "picture has an absurd aspect ratio"
VIDEO = "video cannot be read"
CUT_VIDEO = "video is cut off"
UNDECODABLE = "picture cannot be decoded"
FEATURES = "features cannot be read"
NO_JSON = "sample has no JSON"
JSON = "sample's JSON is broken"
FORMAT = "sample does not follow the format"
BOX = "box is outside its picture or empty"
UNICODE = "text is not valid Unicode"
LONG = "longer than the context"
CHAT = "vocabulary has no [USER]"
NOTHING = "nothing to learn"


@dataclass(frozen=True)
class BadSample:
    """A sample that must be skipped and counted."""

    key: str
    """Its name, which says what is wrong with it."""
    members: dict[str, bytes]
    """Its tar members by their names without the key, `json` among them unless that is missing."""
    reasons: tuple[str, ...]
    """The reasons that would be true; one of them is to be given."""

    @property
    def raw(self) -> RawSample | None:
        """The sample as read; None if its JSON is what cannot be read."""
        try:
            meta = json.loads(self.members["json"])
        except (KeyError, ValueError, RecursionError):
            return None
        files = {name: data for name, data in self.members.items() if name != "json"}
        return RawSample(self.key, meta, files) if isinstance(meta, dict) else None


def bad_samples(chat_vocabulary: bool = False) -> list[BadSample]:
    """All bad samples of a run whose context has at most 2048 tokens. Conversations that are bad in themselves come
    with `chat_vocabulary`; without it, a sound one does, which no base model has tokens for."""
    samples = [*_pictures(), *_videos(), *_json(), *_captions(), *_documents(), *_grounded(), *_generation()]
    return samples + (_chats() if chat_vocabulary else [_bad("chat_base_vocabulary", _CHAT, {}, CHAT)])


_JPEG, _PNG = media.picture("JPEG"), media.picture("PNG")
_TEXT = {"kind": "text", "text": "Call me Ishmael."}
_CHAT = {"kind": "chat", "turns": [{"user": "What is this?", "assistant": "A dog."}]}
PICKLE = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."
_WORDS = "word " * 3000


def _bad(key: str, meta: Any, files: dict[str, bytes], *reasons: str) -> BadSample:
    return BadSample(f"bad_{key}", {"json": json.dumps(meta).encode(), **files}, reasons)


def _picture(key: str, name: str, data: bytes, *reasons: str, text: str = "A dog.") -> BadSample:
    return _bad(key, {"kind": "caption", "text": text, "image": name}, {name: data}, *reasons)


def _pictures() -> list[BadSample]:
    webp, gif = media.picture("WEBP"), media.picture("GIF")
    half = {name: data[: len(data) // 2] for name, data in
            (("jpg", _JPEG), ("png", _PNG), ("webp", webp), ("gif", gif))}  # fmt: skip
    features = media.safetensors("F32", [4, 56], bytes(4 * 56 * 4))
    return [
        *(_picture(f"{name}_cut", f"0.{name}", data, PICTURE) for name, data in half.items()),
        _picture("jpeg_of_20_bytes", "0.jpg", _JPEG[:20], PICTURE),
        _picture("jpeg_damaged", "0.jpeg", half["jpg"] + b"\xff" * 700, PICTURE, UNDECODABLE),
        _picture("png_damaged", "0.png", half["png"] + b"\xff" * 1800, PICTURE, UNDECODABLE),
        _picture("png_without_pixels", "0.png", media.png(10, 10, b""), PICTURE, UNDECODABLE),
        _picture("png_of_width_0", "0.png", media.png(0, 10, b""), PICTURE, UNDECODABLE),
        _picture("webp_damaged", "0.webp", half["webp"] + b"\xff" * 600, PICTURE, UNDECODABLE),
        _picture("jpg_zero_bytes", "0.jpg", b"", EMPTY),
        _picture("png_zero_bytes", "0.png", b"", EMPTY),
        _picture("png_named_jpg", "0.jpg", _PNG, EXTENSION),
        _picture("jpeg_named_webp", "0.webp", _JPEG, EXTENSION),
        _picture("avif_named_png", "0.png", b"\x00\x00\x00\x20ftypavif" + bytes(500), EXTENSION),
        _picture("web_page_named_jpg", "0.jpg", b"<!DOCTYPE html><title>404 Not Found</title>", EXTENSION),
        _picture("zeros_named_png", "0.png", bytes(5000), EXTENSION),
        _picture("mp4_named_gif", "0.gif", media.video(3), EXTENSION),
        _picture("png_bomb", "0.png", media.png(10_000, 10_000, bytes(1251 * 10_000), depth=1), LARGE),
        _picture("png_claims_4e18_pixels", "0.png", media.png(2**31 - 1, 2**31 - 1, bytes(10)), LARGE),
        _picture("jpeg_claims_4e9_pixels", "0.jpg", media.jpeg_of_size(65_500, 65_500), LARGE),
        _picture("png_very_wide", "0.png", media.png(30_000, 3, bytes(3751 * 3), depth=1), ASPECT),
        _picture("jpeg_very_high", "0.jpg", media.picture("JPEG", (1, 20_000)), ASPECT),
        *(_bad(f"features_{key}", {"kind": "caption", "text": "A dog.", "image": "0.safetensors", **encoder},
               {"0.safetensors": data}, *reasons)
          for key, encoder, data, reasons in (
              ("cut", {"emu2_encoder": "f"}, features[:500], (FEATURES,)),
              ("zero_bytes", {"emu2_encoder": "f"}, b"", (FEATURES, EMPTY)),
              ("of_one_dimension", {"emu2_encoder": "f"}, media.safetensors("F32", [8], bytes(32)), (FEATURES,)),
              ("of_no_encoder", {}, features, (FEATURES,)),
              ("pickled", {"emu2_encoder": "f"}, PICKLE, (FEATURES, EXTENSION)))),
    ]  # fmt: skip


def _video(key: str, name: str, data: bytes, *reasons: str) -> BadSample:
    return _bad(f"video_{key}", {"kind": "caption", "text": "A dog.", "video": name}, {name: data}, *reasons)


def _videos() -> list[BadSample]:
    mp4, last, webm = media.video(24, movflags="faststart"), media.video(24), media.video(24, "webm", "libvpx")
    pictures = mp4.index(b"mdat") + 4
    fragments = media.video(24, movflags="frag_keyframe+empty_moov")
    cluster = webm.index(b"\x1f\x43\xb6\x75")
    return [
        # 8 of 24 frames reach beyond the middle of the file; its table of contents promises them all.
        _video("mp4_cut", "0.mp4", mp4[: len(mp4) // 2], CUT_VIDEO, VIDEO),
        _video("mp4_cut_before_pictures", "0.mp4", mp4[:pictures], CUT_VIDEO, VIDEO),
        _video("mp4_cut_before_contents", "0.mp4", last[: len(last) // 2], CUT_VIDEO, VIDEO),
        _video("mp4_header_damaged", "0.mp4", b"\xff" * 64 + mp4[64:], VIDEO, EXTENSION),
        _video("mp4_contents_damaged", "0.mp4", mp4[:44] + bytes(pictures - 60) + mp4[pictures - 16 :], VIDEO),
        _video("mp4_middle_damaged", "0.mp4", mp4[:8000] + b"\xff" * 12000 + mp4[20000:], VIDEO),
        _video("mp4_all_pictures_damaged", "0.mp4", mp4[:pictures] + b"\xff" * (len(mp4) - pictures), VIDEO),
        _video("mp4_of_unknown_codec", "0.mp4", mp4.replace(b"avc1", b"xxxx"), VIDEO),
        _video("mp4_without_frames", "0.mp4", fragments[: fragments.index(b"moof") - 4], VIDEO),
        _video("mp4_with_sound_only", "0.mp4", media.audio(), VIDEO),
        _video("webm_with_sound_only", "0.webm", media.audio("webm", "libopus"), VIDEO),
        _video("webm_cut", "0.webm", webm[: len(webm) // 2], CUT_VIDEO, VIDEO),
        _video("webm_cut_in_header", "0.webm", webm[:200], CUT_VIDEO, VIDEO),
        _video("webm_without_frames", "0.webm", webm[:cluster], CUT_VIDEO, VIDEO),
        _video("webm_header_damaged", "0.webm", b"\xff" * 64 + webm[64:], VIDEO, EXTENSION),
        _video("webm_of_unknown_codec", "0.webm", webm.replace(b"V_VP8", b"V_XX8"), VIDEO),
        _video("mp4_zero_bytes", "0.mp4", b"", EMPTY),
        _video("text_named_mp4", "0.mp4", b"this is not a video\n" * 50, EXTENSION, VIDEO),
        _video("jpeg_named_mp4", "0.mp4", _JPEG, EXTENSION, VIDEO),
        _video("gif_named_webm", "0.webm", media.picture("GIF"), EXTENSION, VIDEO),
    ]


def _json() -> list[BadSample]:
    text = json.dumps(_TEXT).encode()
    deep = b"[" * 100_000 + b"]" * 100_000
    broken = {
        "of_zero_bytes": b"", "cut": text[:-5], "in_python": b"{'kind': 'text', 'text': 'a'}", "of_zeros": bytes(100),
        "not_utf8": json.dumps({"kind": "text", "text": "é"}, ensure_ascii=False).encode("latin-1"),
        "nested": text[:-1] + b', "x": ' + deep + b"}", "only_nested": deep, "two_objects": text + text,
        "list": b"[" + text + b"]", "null": b"null", "string": b'"text"', "number": b"7", "of_jpeg": _JPEG,
    }  # fmt: skip
    return [
        *(BadSample(f"bad_json_{key}", {"json": data}, (JSON,)) for key, data in broken.items()),
        BadSample("bad_json_missing", {"0.jpg": _JPEG}, (NO_JSON,)),
        _bad("surrogate", {"kind": "text", "text": "Call me \ud800 Ishmael."}, {}, UNICODE),
        _bad(
            "surrogate_in_caption", {"kind": "caption", "text": "\udc80", "image": "0.jpg"}, {"0.jpg": _JPEG}, UNICODE
        ),
    ]


def _captions() -> list[BadSample]:
    caption, text = {"kind": "caption", "text": "A dog.", "image": "0.jpg"}, {"kind": "text"}
    metas: dict[str, dict[str, Any]] = {
        "kind_missing": {"text": "A dog.", "image": "0.jpg"}, "kind_unknown": {**caption, "kind": "sculpture"},
        "kind_null": {**caption, "kind": None}, "kind_list": {**caption, "kind": ["caption"]}, "no_fields": {},
        "caption_missing": {"kind": "caption", "image": "0.jpg"}, "caption_empty": {**caption, "text": ""},
        "caption_blank": {**caption, "text": " \n\t"}, "caption_number": {**caption, "text": 7},
        "caption_list": {**caption, "text": ["A dog."]}, "caption_null": {**caption, "text": None},
        "picture_missing": {"kind": "caption", "text": "A dog."}, "picture_unknown": {**caption, "image": "1.jpg"},
        "picture_outside": {**caption, "image": "../../etc/passwd"}, "picture_list": {**caption, "image": ["0.jpg"]},
        "picture_and_video": {**caption, "video": "0.mp4"}, "picture_is_json": {**caption, "image": "json"},
        "video_unknown": {"kind": "caption", "text": "A dog.", "video": "9.mp4"},
        "video_is_picture": {"kind": "caption", "text": "A dog.", "video": "0.jpg"},
        "picture_is_video": {**caption, "image": "0.mp4"},
    }  # fmt: skip
    files = {"0.jpg": _JPEG, "0.mp4": media.video(3)}
    return [
        *(_bad(key, meta, files, FORMAT) for key, meta in metas.items()),
        _bad("member_missing", caption, {}, FORMAT),
        _bad("caption_long", {**caption, "text": _WORDS}, {"0.jpg": _JPEG}, LONG),
        _bad("text_long", {**text, "text": _WORDS}, {}, LONG),
        _bad("text_empty", {**text, "text": ""}, {}, FORMAT, NOTHING),
        _bad("text_missing", text, {}, FORMAT),
        _bad("text_number", {**text, "text": 1.5}, {}, FORMAT),
    ]


def _documents() -> list[BadSample]:
    contents: dict[str, Any] = {
        "string": "A dog.", "object": {"text": "A dog."}, "null": None, "of_strings": ["A dog."], "of_nulls": [None],
        "of_lists": [["text", "A dog."]], "item_empty": [{}],
        "item_of_two_keys": [{"text": "A dog.", "image": "0.jpg"}],
        "item_unknown": [{"text": "A dog."}, {"audio": "0.mp3"}], "item_blank": [{"text": "A dog."}, {"text": " "}],
        "item_number": [{"text": 7}], "picture_unknown": [{"text": "A dog."}, {"image": "7.jpg"}],
        "video_unknown": [{"video": "7.mp4"}],
    }  # fmt: skip
    files = {"0.jpg": _JPEG}
    document = {"kind": "interleaved"}
    return [
        *(_bad(f"content_{key}", {**document, "content": content}, files, FORMAT) for key, content in contents.items()),
        _bad("content_missing", document, files, FORMAT),
        _bad("content_empty", {**document, "content": []}, {}, FORMAT, NOTHING),
        _bad("content_with_cut_picture", {**document, "content": [{"text": "A dog."}, {"image": "0.jpg"}]},
             {"0.jpg": _JPEG[:700]}, PICTURE),
    ]  # fmt: skip


def _grounded() -> list[BadSample]:
    def sample(key: str, *reasons: str, boxes: Any = ([0, 0, 20, 20],), **fields: Any) -> BadSample:
        content = [{"text": "A photo of"}, {"phrase": "a man", "boxes": boxes}]
        meta = {"kind": "grounded", "image": "0.png", "width": 40, "height": 30, "content": content, **fields}
        return _bad(f"grounded_{key}", meta, {"0.png": _PNG}, *reasons)

    huge = 10**400  # an int in JSON that no float can hold
    return [
        sample("box_right_of_picture", BOX, boxes=[[0, 0, 41, 20]]),
        sample("box_below_picture", BOX, boxes=[[0, 0, 20, 20], [0, 0, 20, 300]]),
        sample("box_negative", BOX, boxes=[[-1, 0, 20, 20]]),
        sample("box_inverted", BOX, boxes=[[20, 0, 0, 20]]),
        sample("box_upside_down", BOX, boxes=[[0, 20, 20, 10]]),
        sample("box_nan", BOX, boxes=[[float("nan"), 0, 20, 20]]),
        sample("box_all_nan", BOX, boxes=[[float("nan")] * 4]),
        sample("box_infinite", BOX, boxes=[[0, 0, float("inf"), 20]]),
        sample("box_huge", BOX, boxes=[[0, 0, huge, 20]]),
        sample("box_of_three_numbers", FORMAT, boxes=[[0, 0, 20]]),
        sample("box_of_strings", FORMAT, boxes=[["0", "0", "20", "20"]]),
        sample("box_null", FORMAT, boxes=[None]),
        sample("boxes_not_nested", FORMAT, boxes=[0, 0, 20, 20]),
        sample("boxes_empty", FORMAT, boxes=[]),
        sample("boxes_null", FORMAT, boxes=None),
        sample("phrase_blank", FORMAT, content=[{"phrase": " ", "boxes": [[0, 0, 20, 20]]}]),
        sample("phrase_number", FORMAT, content=[{"phrase": 7, "boxes": [[0, 0, 20, 20]]}]),
        sample("content_missing", FORMAT, content=None),
        sample("size_missing", FORMAT, width=None),
        sample("size_zero", FORMAT, height=0),
        sample("size_negative", FORMAT, width=-40),
        sample("size_string", FORMAT, width="40"),
        sample("size_nan", FORMAT, width=float("nan")),
        sample("size_huge", FORMAT, width=huge),
        sample("size_of_another_picture", FORMAT, width=870, height=80),
        sample("long", LONG, content=[{"text": _WORDS}]),
    ]


def _generation() -> list[BadSample]:
    def sample(key: str, *reasons: str, box: Any = (0, 0, 20, 20), **fields: Any) -> BadSample:
        content = [{"text": "A photo of"}, {"phrase": "a man", "box": box, "image": "1.png"}]
        meta = {"kind": "generation", "width": 40, "height": 30, "target": "0.png", "content": content, **fields}
        files = {"0.png": _PNG, "1.png": media.picture("PNG", seed=1), "2.mp4": media.video(3)}
        return _bad(f"generation_{key}", meta, files, *reasons)

    return [
        sample("target_missing", FORMAT, target=None),
        sample("target_unknown", FORMAT, target="7.png"),
        sample("target_is_video", FORMAT, target="2.mp4"),
        sample("box_without_size", FORMAT, width=None, height=None),
        sample("size_of_another_picture", FORMAT, width=400, height=300),
        sample("box_outside", BOX, box=[0, 0, 50, 20]),
        sample("box_inverted", BOX, box=[20, 0, 0, 20]),
        sample("box_nan", BOX, box=[0, 0, 20, float("nan")]),
        sample("box_short", FORMAT, box=[0, 0, 20]),
        sample("object_unknown", FORMAT, content=[{"phrase": "a man", "box": [0, 0, 20, 20], "image": "7.png"}]),
        sample("content_string", FORMAT, content="A photo of a man"),
        sample("long", LONG, content=[{"text": _WORDS}]),
    ]


def _chats() -> list[BadSample]:
    turn = {"user": "What is this?", "assistant": "A dog."}
    turns: dict[str, Any] = {
        "missing": None, "empty": [], "string": "What is this?", "of_strings": ["What is this?"],
        "without_answer": [{"user": "What is this?"}], "with_empty_answer": [turn, {**turn, "assistant": " "}],
        "with_answer_null": [{**turn, "assistant": None}], "with_answer_list": [{**turn, "assistant": ["A dog."]}],
        "without_question": [{"assistant": "A dog."}], "with_question_number": [{**turn, "user": 7}],
        "with_unknown_item": [{**turn, "user": [{"audio": "0.mp3"}]}],
        "with_unknown_picture": [{**turn, "user": [{"image": "7.jpg"}, {"text": "What is this?"}]}],
        "with_null_item": [{**turn, "user": [None]}],
    }  # fmt: skip
    return [
        *(_bad(f"chat_{key}", {"kind": "chat", "turns": value}, {}, FORMAT) for key, value in turns.items()),
        _bad("chat_system_list", {"kind": "chat", "system": ["Be brief."], "turns": [turn]}, {}, FORMAT),
        _bad("chat_surrogate", {"kind": "chat", "turns": [{**turn, "assistant": "\ud800"}]}, {}, UNICODE),
        _bad("chat_cut_picture", {"kind": "chat", "turns": [{**turn, "user": [{"image": "0.jpg"}]}]},
             {"0.jpg": _JPEG[:700]}, PICTURE),
    ]  # fmt: skip
