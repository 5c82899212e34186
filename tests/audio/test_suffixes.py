from separation.audio.suffixes import AUDIO, AUDIO_OR_VIDEO


def test_audio_and_video_have_suffixes_and_pictures_and_texts_do_not() -> None:
    assert {".wav", ".mp3", ".flac", ".m4a"} < AUDIO < AUDIO_OR_VIDEO
    assert {".mkv", ".mp4", ".mov", ".avi", ".mpg", ".wmv", ".ts", ".flv", ".3gp"} <= AUDIO_OR_VIDEO - AUDIO
    assert not {".jpg", ".png", ".txt", ".html", ".json", ".cue", ".m3u", ".log", ".pdf", ".lrc"} & AUDIO_OR_VIDEO


def test_suffixes_are_lowercase_after_one_dot() -> None:
    for suffix in AUDIO_OR_VIDEO:
        assert suffix == suffix.lower() and suffix.startswith(".") and suffix.count(".") == 1
