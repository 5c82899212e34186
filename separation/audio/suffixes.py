"""The suffixes of audio and video files. In a folder, only these files are tried; a file that is named is always tried.

Without the list, every picture and text in a folder would be handed to ffmpeg and count as a failure.
"""

_LOSSLESS = ".wav .wave .bwf .w64 .rf64 .flac .aif .aiff .aifc .caf .au .snd .ape .wv .tta .tak .alac .dsf .dff .voc"
_LOSSY = (
    ".mp3 .mp2 .mp1 .mpa .mpga .ogg .oga .opus .spx .m4a .m4b .m4r .aac .adts .wma .ac3 .eac3 .ec3 .dts .mka .weba "
    ".mpc .ra .amr .3ga"
)
_VIDEO = (
    ".mp4 .m4v .mov .qt .mkv .mk3d .webm .avi .divx .mpg .mpeg .mpe .vob .wmv .asf .ts .mts .m2ts .m2t .flv .f4v .3gp "
    ".3g2 .ogv .ogx .mxf .rm .rmvb .nut .dv .wtv"
)
AUDIO = frozenset(f"{_LOSSLESS} {_LOSSY}".split())
AUDIO_OR_VIDEO = AUDIO | frozenset(_VIDEO.split())
