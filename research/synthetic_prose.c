/* Words and sentences of made documents; synthetic_prose.h describes them. */
#include "synthetic_prose.h"

#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* An adjective and one or two things, hyphenated, are a key or a list's word. No adjective ends with another and no
 * thing begins with another, so that no such word is found inside another one. */
/* clang-format off */
static const char *const adjectives[] = {
    "amber", "ancient", "bitter", "blue", "brave", "brief", "bright", "broad", "brown", "calm", "careful",
    "cheerful", "chilly", "clean", "clever", "common", "copper", "cosy", "crimson", "crooked", "curious", "damp",
    "dark", "deep", "delicate", "distant", "double", "dusty", "eager", "early", "eastern", "empty", "endless",
    "faded", "faithful", "familiar", "famous", "fancy", "flat", "foreign", "fragile", "fresh", "friendly", "frosty",
    "frozen", "gentle", "gilded", "golden", "graceful", "grand", "green", "grey", "handsome", "hasty", "heavy",
    "hidden", "hollow", "honest", "humble", "idle", "ivory", "jolly", "keen", "kind", "large", "late", "lazy",
    "little", "lively", "lofty", "lonely", "loud", "lucky", "marble", "mellow", "merry", "mild", "modest", "muddy",
    "narrow", "neat", "noble", "northern", "odd", "orange", "painted", "pale", "patient", "peaceful", "plain",
    "pleasant", "polished", "proud", "purple", "quaint", "quick", "quiet", "rapid", "rare", "round", "royal",
    "rusty", "scarlet", "secret", "shallow", "sharp", "shiny", "silent", "silver", "simple", "sleepy", "slender",
    "slow", "smooth", "soft", "solid", "southern", "spare", "steady", "steep", "sturdy", "sunny", "sweet", "swift",
    "tall", "tender", "thick", "thin", "tidy", "tiny", "tough", "upper", "velvet", "warm", "western", "wild",
    "wise", "wooden", "yellow", "young",
};
/* clang-format off */
static const char *const things[] = {
    "accordion", "acorn", "almanac", "anchor", "anvil", "apple", "apricot", "apron", "armchair", "arrow", "atlas",
    "axle", "bagpipe", "balcony", "bandage", "banjo", "banner", "barley", "barometer", "barrel", "basin", "basket",
    "beacon", "bench", "bicycle", "biscuit", "blanket", "blossom", "bonnet", "bookcase", "bottle", "boulder",
    "bracelet", "brick", "bridle", "broom", "brooch", "bucket", "buckle", "bugle", "bundle", "button", "cabbage",
    "cabinet", "cactus", "calendar", "camera", "candle", "canoe", "canvas", "carpet", "carriage", "cart", "cask",
    "catalogue", "cauldron", "cello", "chain", "chalk", "chandelier", "cherry", "chess", "chimney", "chisel",
    "cider", "clarinet", "clock", "cloak", "clover", "coconut", "coin", "compass", "cork", "cradle", "crate",
    "crown", "cucumber", "cupboard", "curtain", "cushion", "cymbal", "dagger", "daisy", "desk", "diary",
    "dictionary", "dinghy", "drawer", "drum", "dumpling", "easel", "elevator", "emerald", "envelope", "fable",
    "fan", "feather", "fence", "fern", "fiddle", "firewood", "flag", "flask", "flute", "folder", "fossil",
    "fountain", "funnel", "furnace", "garland", "garlic", "gate", "ginger", "glove", "goblet", "gong", "granite",
    "grape", "guitar", "hammer", "hammock", "harness", "harp", "hatchet", "helmet", "honey", "hook", "hourglass",
    "inkwell", "jacket", "jar", "jewel", "jigsaw", "jug", "kettle", "keyhole", "kite", "knapsack", "ladder",
    "ladle", "lamp", "lantern", "lavender", "lemon", "lentil", "letter", "lever", "lighthouse", "linen", "locket",
    "loom", "lute", "magnet", "mandolin", "map", "mask", "mattress", "medal", "melon", "microscope", "mirror",
    "mitten", "mosaic", "mug", "mushroom", "napkin", "necklace", "needlework", "notebook", "nutmeg", "oar", "oboe",
    "onion", "oven", "paddle", "pancake", "parcel", "parsley", "peach", "pearl", "pebble", "pencil", "pendulum",
    "pepper", "piano", "pillow", "pitcher", "plough", "plum", "pocket", "poem", "poster", "pottery", "prism",
    "pudding", "pulley", "pumpkin", "puppet", "puzzle", "quilt", "quiver", "raft", "raisin", "rake", "recipe",
    "ribbon", "rocket", "rope", "rosemary", "rudder", "ruler", "saddle", "saffron", "sail", "sandal", "satchel",
    "saucer", "scarf", "scissors", "sculpture", "seashell", "shawl", "shovel", "shutter", "sickle", "sketch",
    "sleigh", "slipper", "sponge", "spoon", "stamp", "statue", "stool", "stove", "suitcase", "sundial", "table",
    "tambourine", "tapestry", "teapot", "telescope", "thimble", "ticket", "timber", "toolbox", "torch", "towel",
    "tray", "trellis", "trowel", "trumpet", "trunk", "tulip", "tunnel", "turnip", "umbrella", "urn", "vase", "vest",
    "vinegar", "violin", "wagon", "walnut", "wardrobe", "watermill", "weathervane", "wheel", "whistle", "willow",
    "window", "wreath", "zither",
};
/* clang-format off */
static const char *const people[] = {
    "actor", "apprentice", "archer", "artist", "baker", "barber", "beekeeper", "blacksmith", "boatman",
    "bookseller", "botanist", "brewer", "bricklayer", "builder", "butcher", "captain", "carpenter", "cartographer",
    "chemist", "clerk", "cobbler", "composer", "conductor", "cook", "cooper", "courier", "dancer", "dentist",
    "doctor", "driver", "editor", "farmer", "ferryman", "fisherman", "florist", "gardener", "geologist", "glazier",
    "goldsmith", "grandmother", "grocer", "guide", "hatter", "historian", "hunter", "inventor", "janitor",
    "jeweller", "judge", "knitter", "librarian", "locksmith", "mason", "mayor", "mechanic", "merchant", "messenger",
    "miller", "miner", "musician", "nephew", "neighbour", "novelist", "nurse", "painter", "pharmacist",
    "photographer", "pilot", "plumber", "poet", "porter", "potter", "printer", "professor", "saddler", "sailor",
    "scholar", "sculptor", "secretary", "shepherd", "singer", "student", "surgeon", "surveyor", "tailor", "teacher",
    "translator", "traveller", "uncle", "visitor", "waiter", "weaver", "widow",
};
static const char *const deeds[] = {
    "admired", "adjusted", "arranged", "bargained for", "borrowed", "bought", "brought", "buried", "carried",
    "chose", "cleaned", "collected", "counted", "covered", "decorated", "described", "discovered", "drew",
    "dropped", "examined", "exchanged", "fetched", "finished", "folded", "forgot", "found", "guarded", "hid",
    "inherited", "inspected", "kept", "labelled", "lent", "lifted", "looked after", "mailed", "measured", "mended",
    "moved", "noticed", "ordered", "packed", "painted", "photographed", "placed", "polished", "praised",
    "protected", "recognised", "remembered", "removed", "repaired", "replaced", "returned", "saved", "searched for",
    "sketched", "sold", "stored", "studied", "touched", "traded", "unpacked", "unwrapped", "used", "valued",
    "washed", "weighed", "wrapped",
};
static const char *const acts[] = {
    "argued", "arrived", "bowed", "celebrated", "daydreamed", "dozed", "hesitated", "hummed", "hurried", "knelt",
    "laughed", "lingered", "listened", "nodded", "paused", "practised", "prayed", "read", "rehearsed", "rested",
    "sang", "shivered", "sighed", "sketched", "slept", "smiled", "sneezed", "stood", "stopped", "stretched",
    "strolled", "talked", "travelled", "trembled", "waited", "walked", "wandered", "whispered", "whistled",
    "worked", "wrote", "yawned",
};
static const char *const places[] = {
    "above the stables", "across the meadow", "against the garden wall", "along the canal", "among the birches",
    "at the crossroads", "at the edge of town", "at the foot of the stairs", "at the market",
    "at the railway station", "behind the chapel", "behind the curtain of ivy", "below the dam",
    "beside the orchard", "between the two barns", "beyond the marsh", "by the duck pond", "by the fireplace",
    "by the north gate", "close to the cliffs", "down by the jetty", "far from the village",
    "in front of the town hall", "in the back room", "in the cellar", "in the courtyard", "in the long corridor",
    "in the old library", "in the schoolyard", "in the valley", "inside the greenhouse", "near the harbour",
    "near the mill", "next to the well", "not far from the inn", "off the coast road", "on the bridge",
    "on the ferry", "on the hillside", "on the second floor", "on the veranda", "opposite the bakery",
    "outside the museum", "over the river", "past the quarry", "round the corner", "through the archway",
    "under the chestnut tree", "under the eaves", "up on the roof", "upstairs", "within sight of the tower",
};
static const char *const times[] = {
    "a week later", "after a long silence", "after breakfast", "after the harvest", "all through the winter",
    "as a rule", "as the rain began", "at dawn", "at first", "at high tide", "at midnight",
    "at the end of the summer", "before lunch", "before the snow melted", "by and by", "by candlelight",
    "during the fair", "during the holidays", "early in the morning", "every other day", "for the third time",
    "from time to time", "in April", "in the autumn", "in the evening", "in the meantime", "just before supper",
    "late in the afternoon", "long ago", "now and then", "on a windy day", "on market days", "on Sundays",
    "on the way home", "on the following day", "once a month", "one evening", "on the eve of the wedding",
    "shortly after noon", "some years earlier", "that same night", "the next morning", "towards evening",
    "twice a year", "when the bells rang", "when the fog lifted", "while the kettle boiled", "without any warning",
};
static const char *const manners[] = {
    "absent-mindedly", "again", "alone", "anxiously", "as usual", "at last", "at length", "by chance", "calmly",
    "carefully", "cheerfully", "eagerly", "for a while", "gladly", "gracefully", "happily", "hastily", "in a hurry",
    "in silence", "in vain", "joyfully", "lazily", "more than once", "nervously", "obediently", "of course",
    "on purpose", "patiently", "politely", "proudly", "quickly", "quietly", "reluctantly", "secretly", "silently",
    "slowly", "solemnly", "suddenly", "thoughtfully", "together", "twice", "warily", "with a smile",
    "with great care", "without a word",
};
/* clang-format on */

/* What @<code> stands for in a template. */
static const struct word_list {
    char code;
    const char *const *words;
    size_t n_words;
} word_lists[PROSE_WORD_LISTS] = {
    {'a', adjectives, COUNT(adjectives)}, {'t', things, COUNT(things)},   {'p', people, COUNT(people)},
    {'v', deeds, COUNT(deeds)},           {'i', acts, COUNT(acts)},       {'l', places, COUNT(places)},
    {'w', times, COUNT(times)},           {'d', manners, COUNT(manners)},
};

static const char *const templates[] = {
    "@w, the @p @v the @a @t @l.",
    "the @a @t @l was what the @p remembered best.",
    "the @p @i @d while the @p @v the @t.",
    "after the @p had left, the @a @t was still @l.",
    "because the @t was @a, the @p @i @l.",
    "nobody @l knew that the @p once @v the @a @t.",
    "the @t and the @t stood @l until the @p @v them.",
    "@w nothing happened @l, so the @p @v the @t @d.",
    "between the @t and the @t, the @p @i @d.",
    "the @p said that the @a @t belonged @l.",
    "@w, the @p and the @p @i @l.",
    "without the @a @t, the @p would never have gone to the house @l.",
    "both the @p and the @p liked the @a @t, but only one of them @v it.",
    "the @p, who was rather @a, @v the @t and @i @d.",
    "what the @p wanted most was the @a @t, yet the @p @v the @t instead.",
    "@l the @p @d @v the @t for the @p.",
    "if the @p had not been so @a, the @t might still be @l.",
    "people @l say that the @t was @a, and that the @p @v it @w.",
    "the @p @v the @a @t @d, and @w the @p @i.",
    "the @a @t cost less than the @t, as the @p found out @w.",
};

/* One of n things, never the same twice in a row. */
static size_t pick(struct sqz_random *random, size_t n, size_t *last)
{
    *last = (*last + 1 + (size_t)sqz_random_below(random, n - 1)) % n;
    return *last;
}

void append_string(struct text_buffer *text, const char *string)
{
    text_buffer_append(text, string, strlen(string));
}

void append_sentence(struct text_buffer *text, struct prose *prose)
{
    size_t begin = text->n_bytes;
    for (const char *t = templates[pick(&prose->random, COUNT(templates), &prose->last_template)]; *t != '\0'; t++) {
        if (*t != '@') {
            text_buffer_append(text, t, 1);
            continue;
        }
        t++;
        size_t list = 0;
        while (word_lists[list].code != *t) list++;
        size_t word = pick(&prose->random, word_lists[list].n_words, &prose->last[list]);
        append_string(text, word_lists[list].words[word]);
    }
    char *first = &text->text[begin];
    if (*first >= 'a' && *first <= 'z') *first = (char)(*first - 'a' + 'A');
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b)
{
    while (b != 0) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

struct vocabulary make_vocabulary(struct sqz_random *random, unsigned n_things)
{
    struct vocabulary v = {.n_words = COUNT(adjectives), .n_things = n_things};
    for (unsigned i = 0; i < n_things; i++) v.n_words *= COUNT(things);
    v.begin = sqz_random_below(random, v.n_words);
    do {
        v.step = sqz_random_below(random, v.n_words);
    } while (greatest_common_divisor(v.n_words, v.step) != 1);
    return v;
}

void append_word(struct text_buffer *text, const struct vocabulary *vocabulary, uint64_t i)
{
    uint64_t at = (vocabulary->begin + vocabulary->step * i) % vocabulary->n_words;
    append_string(text, adjectives[at % COUNT(adjectives)]);
    at /= COUNT(adjectives);
    for (unsigned thing = 0; thing < vocabulary->n_things; thing++) {
        text_buffer_append(text, "-", 1);
        append_string(text, things[at % COUNT(things)]);
        at /= COUNT(things);
    }
}

void append_letters(struct text_buffer *text, uint64_t code, size_t n, char first)
{
    for (size_t i = 0; i < n; i++) {
        char letter = (char)(first + (int)(code % 26));
        text_buffer_append(text, &letter, 1);
        code /= 26;
    }
}
