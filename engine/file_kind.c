/* Files that are no plain text; file_kind.h describes it. */
#include "file_kind.h"

#include <stdint.h>
#include <string.h>

/* ---- Formats by their first bytes ---------------------------------------------------------- */

/* XML without its tags, an end of `tag` as a new line. */
#define SED_XML(tag) " | sed 's/<\\/" tag ">/\\n/g; s/<[^>]*>//g; s/&lt;/</g; s/&gt;/>/g; s/&amp;/\\&/g'"
#define TEXT_OF_ODF  " content.xml" SED_XML("text:[ph]")

/* Bytes of a literal, NULs in it included. */
#define BYTES(literal) literal, sizeof(literal) - 1

/* The first row that fits counts. */
static const struct format {
    size_t offset;
    const char *magic;
    size_t magic_bytes;
    bool letters;       /* the magic could begin a text */
    const char *inside; /* must occur too, NULL: nothing must */
    size_t inside_bytes;
    struct sqz_file_kind kind;
} formats[] = {
    /* Documents */
    {0, BYTES("%PDF-"), false, NULL, 0, {"a PDF file", "pdftotext ", " -"}},
    {0, BYTES("%!PS-"), false, NULL, 0, {"a PostScript file", "ps2ascii ", ""}},
    {0, BYTES("{\\rtf"), false, NULL, 0, {"an RTF file", "unrtf --text ", ""}},
    {0,
     BYTES("PK\3\4"),
     false,
     BYTES("word/document.xml"),
     {"a Word document (docx)", "unzip -p ", " word/document.xml" SED_XML("w:p")}},
    {0,
     BYTES("PK\3\4"),
     false,
     BYTES("xl/workbook.xml"),
     {"an Excel workbook (xlsx)", "unzip -p ", " xl/sharedStrings.xml" SED_XML("si")}},
    {0,
     BYTES("PK\3\4"),
     false,
     BYTES("ppt/presentation.xml"),
     {"a PowerPoint file (pptx)", "unzip -p ", " 'ppt/slides/slide*.xml'" SED_XML("a:p")}},
    {0,
     BYTES("PK\3\4"),
     false,
     BYTES("application/vnd.oasis.opendocument"),
     {"an OpenDocument file", "unzip -p ", TEXT_OF_ODF}},
    {0,
     BYTES("PK\3\4"),
     false,
     BYTES("application/epub+zip"),
     {"an EPUB book", "unzip -p ", " '*.*htm*'" SED_XML("p")}},
    {0, BYTES("PK\3\4"), false, NULL, 0, {"a ZIP archive", "unzip -p ", ""}},
    {0, BYTES("PK\5\6"), false, NULL, 0, {"an empty ZIP archive", NULL, NULL}},
    {0,
     BYTES("\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
     false,
     BYTES("W\0o\0r\0k\0b\0o\0o\0k"),
     {"an old Excel workbook (xls)", "xls2csv ", ""}},
    {0,
     BYTES("\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
     false,
     BYTES("P\0o\0w\0e\0r\0P\0o\0i\0n\0t"),
     {"an old PowerPoint file (ppt)", "catppt ", ""}},
    {0, BYTES("\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), false, NULL, 0, {"an old Word document (doc)", "catdoc ", ""}},
    {60, BYTES("BOOKMOBI"), true, NULL, 0, {"a Mobipocket book", NULL, NULL}},
    {0, BYTES("AT&TFORM"), true, NULL, 0, {"a DjVu file", "djvutxt ", ""}},
    /* Compressed and archived */
    {0, BYTES("\x1f\x8b"), false, NULL, 0, {"compressed by gzip", "gzip -dc ", ""}},
    {4, BYTES("1AY&SY"), true, BYTES("BZh"), {"compressed by bzip2", "bzip2 -dc ", ""}},
    {0,
     BYTES("\xfd"
           "7zXZ\0"),
     false,
     NULL,
     0,
     {"compressed by xz", "xz -dc ", ""}},
    {0, BYTES("\x28\xb5\x2f\xfd"), false, NULL, 0, {"compressed by zstd", "zstd -dcq ", ""}},
    {0, BYTES("\x04\x22\x4d\x18"), false, NULL, 0, {"compressed by lz4", "lz4 -dc ", ""}},
    {0, BYTES("\x1f\x9d"), false, NULL, 0, {"compressed by compress", "gzip -dc ", ""}},
    {0, BYTES("LZIP\1"), false, NULL, 0, {"compressed by lzip", "lzip -dc ", ""}},
    {0, BYTES("7z\xbc\xaf\x27\x1c"), false, NULL, 0, {"a 7-Zip archive", "7z e -so ", ""}},
    {0, BYTES("Rar!\x1a\7"), false, NULL, 0, {"a RAR archive", "unrar p -inul ", ""}},
    {257, BYTES("ustar"), true, NULL, 0, {"a tar archive", "tar -xOf ", ""}},
    {0, BYTES("!<arch>\n"), true, NULL, 0, {"an archive of object files or a Debian package", NULL, NULL}},
    {0, BYTES("\xed\xab\xee\xdb"), false, NULL, 0, {"an RPM package", NULL, NULL}},
    /* Models and tables */
    {0,
     BYTES("GGUF"),
     true,
     BYTES("squeeze.model.fingerprint"),
     {"a prepared context", NULL, "ask and chat take it as it is"}},
    {0, BYTES("GGUF"), true, NULL, 0, {"a GGUF model", NULL, "-m takes a model"}},
    {8, BYTES("{\""), true, BYTES("\"data_offsets\""), {"a safetensors file", NULL, NULL}},
    {0, BYTES("SQLite format 3\0"), false, NULL, 0, {"an SQLite database", "sqlite3 ", " .dump"}},
    {0, BYTES("PAR1"), true, NULL, 0, {"a Parquet file", NULL, NULL}},
    {0, BYTES("ARROW1"), true, NULL, 0, {"an Arrow file", NULL, NULL}},
    {0, BYTES("Obj\1"), false, NULL, 0, {"an Avro file", NULL, NULL}},
    {0, BYTES("\x89HDF\r\n"), false, NULL, 0, {"an HDF5 file", NULL, NULL}},
    {0, BYTES("\x93NUMPY"), false, NULL, 0, {"a NumPy array", NULL, NULL}},
    {0, BYTES("\x80\2"), false, NULL, 0, {"a Python pickle", NULL, NULL}},
    {0, BYTES("\x80\3"), false, NULL, 0, {"a Python pickle", NULL, NULL}},
    {0, BYTES("\x80\4\x95"), false, NULL, 0, {"a Python pickle", NULL, NULL}},
    {0, BYTES("\x80\5\x95"), false, NULL, 0, {"a Python pickle", NULL, NULL}},
    {0, BYTES("bplist00"), true, NULL, 0, {"a binary property list", NULL, NULL}},
    /* Images */
    {0, BYTES("\x89PNG\r\n\x1a\n"), false, NULL, 0, {"a PNG image", "tesseract ", " -"}},
    {0, BYTES("\xff\xd8\xff"), false, NULL, 0, {"a JPEG image", "tesseract ", " -"}},
    {0, BYTES("GIF87a"), true, NULL, 0, {"a GIF image", "tesseract ", " -"}},
    {0, BYTES("GIF89a"), true, NULL, 0, {"a GIF image", "tesseract ", " -"}},
    {8, BYTES("WEBP"), true, BYTES("RIFF"), {"a WebP image", "tesseract ", " -"}},
    {0, BYTES("II*\0"), false, NULL, 0, {"a TIFF image", "tesseract ", " -"}},
    {0, BYTES("MM\0*"), false, NULL, 0, {"a TIFF image", "tesseract ", " -"}},
    {6, BYTES("\0\0\0\0\x36\0\0\0"), true, BYTES("BM"), {"a BMP image", "tesseract ", " -"}},
    {4, BYTES("ftypheic"), true, NULL, 0, {"a HEIC image", NULL, NULL}},
    {4, BYTES("ftypavif"), true, NULL, 0, {"an AVIF image", NULL, NULL}},
    {0, BYTES("\0\0\1\0"), false, NULL, 0, {"an icon", NULL, NULL}},
    /* Sound and video */
    {4, BYTES("ftyp"), true, NULL, 0, {"a video or sound file (MP4)", NULL, NULL}},
    {8, BYTES("WAVE"), true, BYTES("RIFF"), {"a sound file (WAV)", NULL, NULL}},
    {8, BYTES("AVI "), true, BYTES("RIFF"), {"a video (AVI)", NULL, NULL}},
    {0, BYTES("ID3"), true, NULL, 0, {"a sound file (MP3)", NULL, NULL}},
    {0, BYTES("OggS"), true, NULL, 0, {"a sound or video file (Ogg)", NULL, NULL}},
    {0, BYTES("fLaC"), true, NULL, 0, {"a sound file (FLAC)", NULL, NULL}},
    {0, BYTES("\x1a\x45\xdf\xa3"), false, NULL, 0, {"a video (Matroska or WebM)", NULL, NULL}},
    /* Programs */
    {0,
     BYTES("\x7f"
           "ELF"),
     false,
     NULL,
     0,
     {"a program or library (ELF)", NULL, NULL}},
    {0, BYTES("MZ"), true, BYTES("PE\0\0"), {"a Windows program", NULL, NULL}},
    {0, BYTES("\xca\xfe\xba\xbe"), false, NULL, 0, {"a Java class or a macOS program", NULL, NULL}},
    {0, BYTES("\xcf\xfa\xed\xfe"), false, NULL, 0, {"a macOS program", NULL, NULL}},
    {0, BYTES("\0asm"), false, NULL, 0, {"a WebAssembly module", NULL, NULL}},
};

static bool occurs(const char *bytes, size_t n_bytes, const char *what, size_t n)
{
    const char *at = bytes, *end = bytes + n_bytes;
    while ((size_t)(end - at) >= n && (at = memchr(at, what[0], (size_t)(end - at) - n + 1))) {
        if (memcmp(at, what, n) == 0) return true;
        at++;
    }
    return false;
}

const struct sqz_file_kind *sqz_file_kind(const char *bytes, size_t n_bytes, bool is_text)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        const struct format *f = &formats[i];
        if ((f->letters && is_text) || n_bytes < f->offset + f->magic_bytes) continue;
        if (memcmp(bytes + f->offset, f->magic, f->magic_bytes) != 0) continue;
        if (!f->inside || occurs(bytes, n_bytes, f->inside, f->inside_bytes)) return &f->kind;
    }
    return NULL;
}

/* ---- Text in wider characters ---------------------------------------------------------------- */

enum { SAMPLE_UNITS = 4096 };

static uint32_t unit16(const unsigned char *p, bool big)
{
    return big ? (uint32_t)p[0] << 8 | p[1] : (uint32_t)p[1] << 8 | p[0];
}

static uint32_t unit32(const unsigned char *p, bool big)
{
    return big ? unit16(p, true) << 16 | unit16(p + 2, true) : unit16(p + 2, false) << 16 | unit16(p, false);
}

/* Whether a unit of UTF-16 is what texts are made of: letters and signs of living scripts, blanks and new lines. */
static bool is_usual(uint32_t unit)
{
    static const uint16_t ranges[][2] = {
        {0x09, 0x0d},     {0x20, 0x7e},     {0xa0, 0x1fff},   {0x2010, 0x2027}, {0x2030, 0x205e},
        {0x20a0, 0x20bf}, {0x2190, 0x22ff}, {0x3000, 0x30ff}, {0x4e00, 0x9fff}, {0xac00, 0xd7a3},
        {0xd800, 0xdfff}, {0xfb00, 0xfeff}, {0xff00, 0xffef},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (unit >= ranges[i][0] && unit <= ranges[i][1]) return true;
    return false;
}

/* Latin text: half of the bytes at one parity are zero, nearly none at the other. */
static bool has_zeros_of_utf16(const unsigned char *p, size_t n_units, bool big)
{
    size_t high = 0, low = 0;
    for (size_t i = 0; i < n_units; i++) {
        high += p[2 * i + !big] == 0;
        low += p[2 * i + big] == 0;
    }
    return n_units > 0 && 2 * high >= n_units && 20 * low <= n_units;
}

/* Units of either byte order that are usual; 0 for what is mostly ASCII, whose pairs look like Chinese. */
static size_t count_usual(const unsigned char *p, size_t n_units, bool big)
{
    size_t usual = 0, ascii = 0;
    for (size_t i = 0; i < n_units; i++) {
        usual += is_usual(unit16(p + 2 * i, big));
        ascii += (p[2 * i] >= ' ' && p[2 * i] <= '~') + (p[2 * i + 1] >= ' ' && p[2 * i + 1] <= '~');
    }
    return 10 * ascii < 6 * 2 * n_units ? usual : 0;
}

static bool is_utf32(const unsigned char *p, size_t n_bytes, bool big)
{
    const size_t n = n_bytes / 4 < SAMPLE_UNITS ? n_bytes / 4 : SAMPLE_UNITS;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = unit32(p + 4 * i, big);
        if (c < '\t' || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) return false;
    }
    return n >= 2;
}

const struct sqz_file_kind *sqz_wide_text_kind(const char *bytes, size_t n_bytes)
{
    static const struct sqz_file_kind utf32 = {"UTF-32 text", "iconv -f UTF-32 -t UTF-8 ", ""},
                                      utf32le = {"UTF-32 text", "iconv -f UTF-32LE -t UTF-8 ", ""},
                                      utf32be = {"UTF-32 text", "iconv -f UTF-32BE -t UTF-8 ", ""},
                                      utf16 = {"UTF-16 text", "iconv -f UTF-16 -t UTF-8 ", ""},
                                      utf16le = {"UTF-16 text", "iconv -f UTF-16LE -t UTF-8 ", ""},
                                      utf16be = {"UTF-16 text", "iconv -f UTF-16BE -t UTF-8 ", ""};
    const unsigned char *p = (const unsigned char *)bytes;
    const size_t n = n_bytes / 2 < SAMPLE_UNITS ? n_bytes / 2 : SAMPLE_UNITS;
    if (n_bytes >= 4 && (memcmp(p, "\xff\xfe\0\0", 4) == 0 || memcmp(p, "\0\0\xfe\xff", 4) == 0)) return &utf32;
    if (n_bytes >= 2 && (memcmp(p, "\xff\xfe", 2) == 0 || memcmp(p, "\xfe\xff", 2) == 0)) return &utf16;
    if (is_utf32(p, n_bytes, false)) return &utf32le;
    if (is_utf32(p, n_bytes, true)) return &utf32be;
    if (has_zeros_of_utf16(p, n, false)) return &utf16le;
    if (has_zeros_of_utf16(p, n, true)) return &utf16be;
    const size_t little = count_usual(p, n, false), big = count_usual(p, n, true);
    const size_t more = little >= big ? little : big;
    if (n < 4 || 20 * more < 19 * n) return NULL;
    return little >= big ? &utf16le : &utf16be;
}
