"""Small children's stories from a seeded program: the training text of the tiny Qwen3.

A plot is a list of slots, a slot a list of wordings. Two marks are used in a wording:
`{hero}` stands for a word of this story and `[a|b]` for one of several ways to say it.
"""

import random
import re
import zlib
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


FEMALE = _words(
    "Ada Alma Bella Clara Dora Ella Emmy Frida Greta Hanna Ines Jola Kira Lena Lotta "
    "Maya Mira Nina Nora Olga Pia Runa Sofi Tara Tilda Uma Vera Wanda Yara Zoe"
)
MALE = _words(
    "Anton Arlo Ben Bruno Carlo Dario Emil Felix Finn Gus Hugo Igor Jonas Karl Leo "
    "Milo Nils Otto Paul Quin Remo Sam Theo Tobin Udo Victor Walt Yuri Zeno Dano"
)
ANIMALS = _words(
    "badger bear beaver cat deer dog duck fox frog goat hedgehog mouse otter owl pig "
    "pony rabbit raccoon sheep squirrel turtle"
)
PLACES = {
    "in": _words("barn forest garden meadow orchard town valley village"),
    "by": _words("lake pond river stream"),
    "near": _words("beach bridge castle cave harbor mill park swamp"),
    "on": _words("farm hill island mountain prairie"),
}
MAX_WORDS = 170
PLACE_ADJECTIVES = "[big |small |quiet |green |lovely |||]"

CLOTH = _words("blanket cape coat hat mitten pillow scarf")  # soft: nothing to break
LIGHT = _words("balloon feather flag kite ribbon")  # the wind takes them
FRAGILE = _words(
    "basket boat bowl clock cup doll drum flute guitar jar lamp lantern mask mirror plate "
    "puppet teapot umbrella whistle"
)
STURDY = _words(
    "ball bell book brush button coin crown key map marble necklace ring spoon"
)
BIG = _words("barrel cart chair chest ladder pumpkin sled table wagon")
SMALL = CLOTH + LIGHT + FRAGILE + STURDY
ADJECTIVES = _words(
    "blue green golden little new old purple red round shiny white yellow"
)

# ----------------------------------------------------------------- openings

INTRODUCE = [
    "Once [upon a time |]there was {a_hero} named {hero} who lived {at_place}.",
    "There once was {a_hero} named {hero} who lived {at_place}.",
    "Long ago, {a_hero} named {hero} lived {at_place}.",
    "{At_place} lived {a_hero} named {hero}.",
    "{A_hero} named {hero} [lived|had a home] {at_place}.",
    "{At_place}, there lived {a_hero} named {hero}.",
]
OWN = [
    "{He} had {a_thing} that {he} [loved|liked] very much.",
    "{hero} had {a_thing} and [was very proud of it|took good care of it].",
    "{His} [favorite|dearest] thing was {a_thing}.",
    "{He} owned {a_thing}, and {he} [loved it|looked at it every day].",
    "More than anything, {hero} loved {a_thing} that {he} had [at home|got as a baby].",
    "{hero} was [happy|proud] because {he} had {a_thing}.",
    "Of all the things {he} had, {hero} liked {a_thing} [best|the most].",
]

# ------------------------------------------- slots that several plots draw on

WEATHER = [
    "",
    "The sun was [warm|bright|shining] and the birds [sang|were singing].",
    "The sky was [blue|clear], and a [soft|light|warm] wind was blowing.",
    "[White|Small] clouds [moved|drifted] slowly across the sky.",
    "Bees [hummed|buzzed] in the flowers, and the air [was warm|smelled sweet].",
    "It was a [lovely|quiet|fine] day[ and the air was fresh|].",
]
DAY = "One [sunny|warm|cool|bright|fine|quiet] [morning|day|afternoon]"
OUT = [
    f"{DAY}, {{hero}} took {{t}} [out to play|for a walk|outside].",
    f"{DAY}, {{hero}} [played|walked|ran] near the {{place}} with {{t}}.",
    f"{DAY}, {{hero}} [went out|set off|left the house] with {{t}} [under one arm|as always].",
    f"{DAY}, {{he}} [wanted|decided] to take {{t}} [along on a walk|to a sunny spot].",
    "One day after [breakfast|lunch], {hero} [carried|took] {t} [down the path|outside].",
]
SAD = [
    "",
    "{hero} [felt|was] [very |so |]sad.",
    "[A tear|A big tear] ran down {his} [cheek|face|nose].",
    "{hero} sat down [on a stone|in the grass|under a tree] and [cried|sighed].",
    "{hero} [did not know|had no idea] what to do.",
    '"Oh no!" [cried|said|called] {hero}.',
    '"What [can|shall] I do now?" [asked|said|cried] {hero}.',
]
FRIEND_COMES = [
    "Just then, {a_friend} named {friend} [came by|came down the path|walked by].",
    (
        "[Soon|After a while], {a_friend} named {friend} [saw|heard] {hero} and "
        "[stopped|came over]."
    ),
    (
        "[Nearby|Not far away], {a_friend} named {friend} [heard|saw] {hero} and came "
        "[running|over]."
    ),
    "{A_friend} named {friend} was [picking berries|resting|walking] nearby and came over.",
    "At that moment, {a_friend} named {friend} [looked over the fence|came around the corner].",
]
ASK = [
    '"What is [wrong|the matter]?" asked {friend}.',
    '"Why are you [so sad|sad|so quiet]?" asked {friend}.',
    "{friend} asked {hero} what was wrong.",
    '"Can I help you?" asked {friend} [kindly|in a soft voice].',
    '"Hello, you look [sad|worried]," said {friend}.',
]
TELL = [
    "{hero} told {friend} [everything|the whole story|about {t}].",
    "{hero} pointed and [told|explained] the whole story.",
    "So {hero} told {friend} what had happened [to|with] {t}.",
    '"It is about my {noun}," [said|answered] {hero}[ sadly|].',
    '"I need help with my {noun}," [said|answered] {hero}.',
]
OFFER = [
    '"Do not [worry|cry|be sad], I will help you," said {friend}.',
    '"I [can|will] help you, {hero}," said {friend}[ with a smile| kindly|].',
    '"We can do it together," [said|answered] {friend}.',
    "{friend} [smiled|nodded] and [wanted|promised] to help.",
    '"Two are better than one," said {friend}[ with a smile| kindly|].',
]
THANKS = [
    '"Thank you, {friend}," [said|cried|called] {hero}[ happily|].',
    "{hero} [hugged|thanked] {friend} [and smiled|with a big smile|again and again].",
    '"You are a [good|true|kind|great] friend," said {hero} to {friend}.',
    "{hero} [laughed|jumped|danced] with joy and [thanked|hugged] {friend}.",
    '"Thank you so much," said {hero}, and {friend} [smiled|laughed].',
]
JOY = [
    "",
    "Both of them [smiled|laughed|were very happy].",
    "Now {hero} was [happy|full of joy] again.",
    "{friend} was [glad|happy|proud] too.",
    "They [sat|rested] in the [sun|grass] and [ate berries|sang a song|told funny stories].",
    "{hero} and {friend} [danced|laughed|sang] until the sun went down.",
]
FRIENDS_END = [
    "From that day on, {hero} and {friend} [looked after|played with] {t} together.",
    "From then on, {hero}, {friend} and {t} were [often|always] seen together.",
    "And that is how {hero} and {friend} became [best|good|true] friends, thanks to {t}.",
    (
        "Ever since that day, {hero} and {friend} [have been best friends|smile] "
        "when they [see|look at] {t}."
    ),
]
NIGHT_END = [
    "That [night|evening], {hero} fell asleep with {t} [close by|by {his} side].",
    (
        "That [night|evening], {hero} put {t} next to the bed and [slept well|dreamed of "
        "{friend}]."
    ),
]

# -------------------------------------------------------------------- plots

LOST = [
    OUT,
    WEATHER,
    [
        (
            "But when {he} [wanted to go home|looked around|woke up from a nap], {t} was "
            "[gone|missing|not there]."
        ),
        "On the way [home|back], {hero} saw that {t} was [gone|missing].",
        "Suddenly {he} could not find {t} [anywhere|any more].",
        "{He} stopped to rest, and then {he} saw that {he} had lost {t}.",
        "After a [short|long] nap, {hero} looked for {t}, but it was [gone|missing].",
    ],
    [
        "",
        "{He} looked [left and right|up and down|all around], but saw nothing.",
        "{He} searched [the path|the grass|the house] for a long time.",
        '"Where can my {noun} be?" [asked|said] {hero}.',
    ],
    SAD,
    FRIEND_COMES,
    ASK,
    TELL,
    [
        '"Let us look for it together," said {friend}.',
        '"I will help you look for {t}," [said|promised] {friend}.',
        '"Do not [worry|cry], we will look everywhere," said {friend}.',
        "{friend} [promised|wanted] to help {hero} look for {t}.",
    ],
    [
        "They looked [under the bushes|behind the trees|in the tall grass|along the path].",
        (
            "{hero} looked [behind the trees|in the grass], and {friend} looked [under the "
            "bushes|"
            "along the path]."
        ),
        "Step by step, they [walked back|went back] to the {place}.",
        "They searched [high and low|here and there|for a long time].",
    ],
    [
        (
            "[At last|Then|In the end], {friend} found {t} [behind a big stone|under a bush|"
            "in a pile of leaves|next to a log]."
        ),
        (
            "[At last|Then|In the end], {hero} found {t} [behind a tree|between two roots|"
            "in a small hole|near the {place}]."
        ),
        (
            '"Here it is!" called {friend}, who had found {t} [under a leaf|behind a bush|'
            "in the grass]."
        ),
        (
            "[Behind an old log|Under a small bush|Between two stones], {hero} and {friend} "
            "found {t}."
        ),
    ],
    THANKS,
    JOY,
    FRIENDS_END
    + NIGHT_END
    + [
        "From that day on, {hero} [kept|held] {t} close and never lost it again.",
        "After that day, {hero} took good care of {t} and never lost it again.",
        "That is how {t} was found, and {hero} and {friend} became friends.",
    ],
]

BROKEN = [
    [
        f"{DAY}, {{hero}} [wanted|decided] to [show|bring] {{t}} to the [neighbors|birds].",
        f"{DAY}, {{hero}} was playing with {{t}} near the {{place}}.",
        f"{DAY}, {{hero}} [ran|skipped|hurried] down the path with {{t}}.",
        f"{DAY}, {{he}} took {{t}} outside [to look at it in the sun|to show it to the birds].",
    ],
    WEATHER,
    [
        "But {he} [slipped|tripped over a root|fell], and {t} [broke|cracked|was broken].",
        "Then {t} hit a [hard stone|wall|fence] and [broke|cracked].",
        "Suddenly there was a loud [noise|bang], and {t} was broken.",
        "{He} was not careful, and {t} [fell down|hit the ground] and broke.",
        "All at once, {t} [tipped over|hit a rock] and broke [in two|into pieces].",
    ],
    SAD,
    [
        "",
        "{He} [tried|wanted] to put the pieces together, but it was too hard.",
        "{He} picked up the pieces [one by one|very slowly|with care].",
        '"My poor {noun}!" [said|cried] {hero}.',
    ],
    FRIEND_COMES,
    ASK,
    TELL,
    OFFER,
    [
        (
            "{friend} [ran home|went home] and came back with [glue|some glue|string|glue "
            "and string]."
        ),
        "{friend} had a [box|bag] of tools at home, and {hero} [waited|came along].",
        "{hero} held the pieces, and {friend} [worked with glue|tied them with string].",
        "They [sat|worked] [in the shade|on a bench|at the door] with [glue|string|tools].",
    ],
    [
        "",
        "It took a long time, but they did not give up.",
        "They worked [slowly|with care].",
        "{hero} watched and helped [a little|with every piece].",
    ],
    [
        "[At last|In the end|Before long], {hero} and {friend} had [mended|fixed] {t}.",
        "[Piece by piece|Bit by bit], they [mended|fixed] {t} together.",
        (
            "[At last|In the end], {t} was [mended|fixed] and [looked as good as new|worked "
            "again]."
        ),
        '"Look, it is mended!" said {friend}, and {t} was [whole again|as good as new].',
        "Soon {t} was [fixed|mended], and it looked [lovely|better than before].",
    ],
    THANKS,
    JOY,
    [
        *FRIENDS_END,
        (
            "From that day on, {hero} was [very |more |]careful with {t}, and it never broke "
            "again."
        ),
        "After that day, {hero} loved the mended {noun} even more[ than before|].",
        "And that is how {hero} and {friend} mended {t} and became friends.",
        (
            "From then on, {hero} and {friend} mended [old things|toys] together and kept "
            "{t} safe."
        ),
    ],
]

SHARED = [
    [
        f"{DAY}, {{hero}} was [playing|busy|sitting] with {{t}} near the {{place}}.",
        f"{DAY}, {{hero}} [took|brought] {{t}} outside [to play|into the sun].",
        (
            f"{DAY}, {{he}} was [looking at|playing with] {{t}} [under a tree|in front of the "
            f"house]."
        ),
        f"{DAY}, {{hero}} [sang|hummed] a song and played with {{t}}.",
    ],
    WEATHER,
    [
        (
            "[Soon|Just then|After a while], {a_friend} named {friend} [came by|came over to "
            "play]."
        ),
        "{A_friend} named {friend} [came by|walked by|came over] and stopped.",
        "Just then, {a_friend} named {friend} came [down the path|along] and looked at {t}.",
        "[Soon|Then] {a_friend} named {friend} [saw|spied] {t} and came closer.",
    ],
    [
        '"What a [lovely|nice|fine] {noun}!" said {friend}.',
        '"Hello," said {friend} [shyly|kindly].',
        "{friend} looked at {t} with big eyes.",
        '"May I [try|have] it?" asked {friend}.',
    ],
    [
        "{friend} wanted {t} too, but {hero} [said no|held it tight|shook {his} head].",
        "Now {hero} and {friend} both wanted {t} at the same time.",
        "{hero} and {friend} both wanted {t}[, and nobody gave up|].",
        "{hero} wanted {t}, and {friend} wanted it too.",
    ],
    [
        '"It is mine!" [cried|shouted|said] {hero}.',
        "They [pulled and pulled|shouted|argued], [and nobody was happy|and nobody had fun].",
        "{hero} pulled on one side, and {friend} pulled on the other.",
        '"I want it now!" [cried|shouted] {friend}.',
    ],
    [
        "{friend} [looked sad|turned away|sat down in the grass] and [was quiet|sighed].",
        "Then {friend} began to cry, and {hero} [felt sorry|stopped].",
        "After a while, both were [tired|sad] and [quiet|sat down].",
        "{hero} saw how sad {friend} was and [felt sorry|thought for a while].",
    ],
    [
        '"I am sorry, we can share," said {hero}.',
        '"Let us share it," [said|whispered] {hero}[ at last|].',
        '"We can take turns," said {friend}[ at last| softly|].',
        '"I have an idea: we can take turns," said {hero}.',
        '"It is more fun when we share," said {hero}[ softly|].',
    ],
    [
        "First {friend} [had|got] {t}, and then it was the turn of {hero}.",
        "So they shared {t}, and [nobody was sad|both were happy].",
        "So {hero} and {friend} took turns with {t} [all day|until dinner].",
        "{friend} [nodded|smiled], and they shared {t} [all day|until the sun went down].",
    ],
    [
        "",
        "It was [much more|twice the] fun [together|this way].",
        "{hero} and {friend} [laughed|smiled] [a lot|at each other].",
        '"This is [fun|better]!" [said|cried] {friend}.',
    ],
    [
        "From that day on, {hero} and {friend} shared {t}.",
        "From then on, {hero} and {friend} took turns with {t} [every day|and never argued].",
        "And that is how {hero} and {friend} learned to share {t}.",
        "Ever since that day, {hero} and {friend} have shared {t} [and been friends|happily].",
        "After that day, {hero} [liked|loved] to share {t} with {friend}.",
    ],
]

HIGH = [
    OUT,
    [
        "",
        "The wind was [strong|wild] that day.",
        "A [strong|cold] wind [began to blow|came up].",
        "The leaves [danced|shook] in the wind.",
        "The trees [moved|swayed] in the wind.",
    ],
    [
        (
            "Suddenly the wind [took|lifted|grabbed] {t} and it got stuck in a [tall |big "
            "|old |]tree."
        ),
        (
            "[Whoosh, the|Then the|All at once, the] wind blew {t} up [onto a roof|into a "
            "tree], "
            "where it was stuck."
        ),
        (
            "A [gust|blast] of wind [took|lifted] {t}, and it got stuck [on a high branch|on "
            "a roof]."
        ),
        "Up and up flew {t}, until it was stuck in a [tall|big|high] tree.",
    ],
    [
        "{hero} jumped [and jumped|three times|high], but {he} could not reach it.",
        "{He} [stretched|stood on a stone|jumped], but it was too high.",
        "{hero} tried to climb up, but it was too high.",
        "{He} [shook the tree|threw a stick], but {t} stayed up there, out of reach.",
    ],
    SAD,
    FRIEND_COMES,
    ASK,
    TELL,
    OFFER,
    [
        "{friend} [was very good at climbing|looked up and thought for a while].",
        "{friend} [brought|got] a long [stick|pole] from home.",
        "{hero} stood [very still|close to the tree], and {friend} climbed onto {his} back.",
        "{friend} stood [very still|tall], and {hero} climbed up onto {fhis} back.",
        "{friend} began to climb, and {hero} [watched|waited] below.",
    ],
    [
        "[At last|Then|In the end], {friend} got {t} down.",
        "With one [push|pull|big stretch], {friend} got {t} down.",
        (
            "[At last|Slowly|Then], {t} came down, [right into the arms of|and landed in "
            "front of] "
            "{hero}."
        ),
        "They [pushed|shook|pulled] a little, and {t} came down.",
        "[Together|In the end], {hero} and {friend} got {t} down.",
    ],
    THANKS,
    JOY,
    FRIENDS_END
    + NIGHT_END
    + [
        "From that day on, {hero} held {t} tight when the wind blew.",
        "And that is how {hero} and {friend} got {t} down and became friends.",
        (
            "After that day, {hero} and {friend} [played|went out] with {t} only when the "
            "wind was "
            "soft."
        ),
    ],
]

HEAVY = [
    [
        (
            f"{DAY}, {{hero}} [wanted|decided] to [bring|take|move] {{t}} to the "
            f"[market|{{place}}]."
        ),
        f"{DAY}, {{hero}} [wanted|decided] to bring {{t}} to [grandmother|the new house].",
        f"{DAY}, {{he}} [had|got] the idea to move {{t}} [into the shade|across the yard].",
        (
            "One day there was a [market|party] near the {place}, and {hero} wanted to bring "
            "{t} along."
        ),
    ],
    WEATHER,
    [
        "But {t} was [much |far |]too heavy.",
        "{hero} pushed and pulled, but {t} [did not move|would not move].",
        "{He} tried to lift {t}, but it was too heavy.",
        "But {t} was so big that {he} could not lift it.",
        "{hero} pushed with all {his} might, but {t} did not move at all.",
    ],
    [
        "",
        "{He} tried again and again.",
        "{hero} [stopped|sat down] to [rest|catch {his} breath].",
        "{His} arms [hurt|were tired] and {his} face was [hot|red].",
    ],
    SAD,
    FRIEND_COMES,
    ASK,
    TELL,
    OFFER,
    [
        "{friend} [stood|went] on one side, and {hero} [stood|went] on the other.",
        "{hero} pulled in front, and {friend} pushed from behind.",
        "{friend} pulled in front, and {hero} pushed from behind.",
        '"Ready, steady, go!" [called|shouted] {friend}.',
    ],
    [
        "Together they [lifted|pushed|moved] {t} [up the path|along the path|over the grass].",
        "[Slowly|At last|Bit by bit], they moved {t} [together|along the path].",
        "This time {t} moved, [slowly at first and then faster|a little and then a lot].",
        "[Together|Side by side], {hero} and {friend} carried {t} [all the way|down the path].",
    ],
    [
        "",
        "They [sang|laughed] on the way.",
        "Now and then they stopped to [rest|eat a berry].",
        "The way was long, but they did not give up.",
    ],
    [
        "[Before long|At last|In the end], {t} was [in the right place|where it should be].",
        (
            "[Before dinner|At last|In the end], {hero} and {friend} [were there|arrived] "
            "with {t}."
        ),
        '"We did it!" [cried|called] {friend} when {t} was in the right place.',
    ],
    THANKS,
    JOY,
    [
        *FRIENDS_END,
        "From that day on, {hero} and {friend} carried heavy things together, not only {t}.",
        "And that is how {hero} and {friend} moved {t} and became friends.",
        "After that day, {hero} asked {friend} for help when {t} was too heavy.",
        "From then on, {hero} knew that with {friend} not even {t} was too heavy.",
    ],
]

FORGOTTEN = [
    OUT,
    WEATHER,
    [
        "{He} sat down [on a bench|under a tree|on a stone] and put {t} [down|on the ground].",
        "{He} [put|laid] {t} [in the grass|on a wall|next to a tree] and [played|took a nap].",
        "After a while {he} [put|laid] {t} down and [picked flowers|watched the birds].",
    ],
    [
        "When it was time [to go home|for dinner], {he} [ran off|left] and forgot {t}.",
        "Then {he} [got hungry and |]went home, but {he} forgot {t}.",
        "{He} went home [singing|in a hurry] and left {t} behind.",
        "[In the evening|Later], {he} ran home [fast|in a hurry] and forgot all about {t}.",
    ],
    [
        "[Soon|A little later], {a_friend} named {friend} [came by|walked by] and saw {t}.",
        (
            "{A_friend} named {friend} came [down the path|along] and saw {t} [lying "
            "there|all alone]."
        ),
        "[Soon|After a while], {a_friend} named {friend} [saw|picked up] {t}.",
        "Then {a_friend} named {friend} [stopped|looked down] and saw {t}.",
    ],
    [
        '"This is the {noun} of {hero}," [said|thought] {friend}.',
        '"{hero} will miss this {noun}," [said|thought] {friend}.',
        '"I know this {noun}, it belongs to {hero}," said {friend}.',
        "{friend} knew that {t} belonged to {hero}.",
    ],
    [
        "",
        "{friend} [picked it up|took it] and [ran|walked] to the house of {hero}.",
        "{friend} [brushed off the dust|held it with care] and [ran|set off] at once.",
    ],
    [
        "At home, {hero} [looked|felt] very sad.",
        "At home, {hero} [sat at the window|lay on the bed] and [sighed|cried].",
        '"Oh no, my {noun}!" [cried|said] {hero} at home.',
        "At home, {hero} [missed|thought of] {t} and could not [sleep|eat|play].",
    ],
    [
        "",
        "Then there was a knock at the door.",
        "[Knock|Tap], [knock|tap], it went at the door.",
        '"Hello, is anyone at home?" called {friend} [at the door|outside].',
    ],
    [
        "{friend} stood [there|at the door] and gave {t} back to {hero}.",
        "{friend} had brought {t} back.",
        "It was {friend}, who had brought {t} back[ to {hero}|].",
        '"Here it is," said {friend}, and [gave|handed] {t} back to {hero}.',
        "{friend} [smiled|laughed] and gave {t} back[ to {hero}|].",
    ],
    THANKS,
    JOY,
    FRIENDS_END
    + NIGHT_END
    + [
        "From that day on, {hero} never forgot {t} again.",
        "And that is how {friend} brought {t} back and became the best friend of {hero}.",
        "After that day, {hero} [looked twice|was careful] and never left {t} behind again.",
    ],
]

STORM = [
    OUT,
    [
        "{A_friend} named {friend} came along, and they [walked|played] together.",
        "On the way, {hero} met {a_friend} named {friend}, and they [played|walked] together.",
        "{hero} showed {t} to {a_friend} named {friend}[, and both were happy|].",
        "[Soon|Near the {place}], {a_friend} named {friend} came to play too.",
    ],
    [
        (
            "[Suddenly|Then|All at once], [dark|black|big dark] clouds [came|rolled in], "
            "and it began "
            "to rain."
        ),
        "[Suddenly|Then|All at once], a [big |wild |]storm [came up|began].",
        "Then the sky turned [black|dark], and a storm [began|came].",
        "[Suddenly|All at once], there was thunder, and it began to rain.",
    ],
    [
        "",
        "The wind [howled|blew] and the trees [shook|swayed].",
        "[Boom|Bang], went the thunder.",
        "Big drops [fell|came down] [on the path|everywhere].",
    ],
    [
        '"My {noun} will get wet!" [cried|said] {hero}.',
        "{hero} was [afraid|scared] and [held|hid] {t} under one arm.",
        "{hero} did not want {t} to get wet.",
        '"What about my {noun}?" [cried|asked] {hero}.',
    ],
    [
        '"Come with me, quick!" [called|shouted|cried] {friend}.',
        '"I know a [safe|good] place," [said|called] {friend}.',
        '"Do not be afraid, {hero}," said {friend}.',
        '"Follow me," [said|called] {friend}, and [they ran|both ran fast].',
    ],
    [
        "",
        "{hero} ran [fast|as fast as the wind] and [did not let go of|held on to] {t}.",
        "They ran [over the grass|along the path] [hand in hand|side by side].",
        "{friend} [knew the way|ran in front].",
    ],
    [
        (
            "They [hid|sat] in [a hollow tree|an old barn|a little hut], where it was [warm "
            "and |]dry."
        ),
        (
            "[At last|Soon], {hero} and {friend} [reached|came to] [a little hut|an old "
            "barn], where it "
            "was dry."
        ),
        "[A hollow tree|A little hut|An old barn] gave them shelter, and {t} stayed dry.",
        "Under [a big roof|a wide rock], {hero} and {friend} had shelter.",
    ],
    [
        "",
        "{hero} and {friend} [told funny stories|sang songs] and were not [afraid|scared].",
        "They sat [very close|side by side] [and listened|and waited].",
        '"We are safe here," said {friend}.',
    ],
    [
        "[At last|After a while], the storm [passed|was over], and {t} was [safe and |]dry.",
        "[At last|After a while], the rain stopped and the sun came out.",
        "Then the sun came out again, and {t} [shone in the light|was still dry].",
        "[Soon|Before long], the storm was over, and a rainbow stood in the sky.",
    ],
    THANKS,
    JOY,
    FRIENDS_END
    + NIGHT_END
    + [
        "From that day on, {hero} and {friend} were not afraid of a storm, and {t} stayed dry.",
        "And that is how {hero} and {friend} kept {t} dry in the storm.",
        "After that day, {hero} looked at the sky before taking {t} outside with {friend}.",
    ],
]

GIFT = [
    [
        f"{DAY}, {{hero}} [went|walked] to [visit|see] {{a_friend}} named {{friend}}.",
        f"{DAY}, {{hero}} met {{a_friend}} named {{friend}} near the {{place}}.",
        "{hero} had a [good|dear] friend, {a_friend} named {friend}.",
        f"{DAY}, {{a_friend}} named {{friend}} [asked|invited] {{hero}} to come over.",
    ],
    WEATHER,
    [
        "It was the birthday of {friend}, but {hero} had no present.",
        "{friend} had a birthday, and {hero} wanted to bring a [nice|good|fine] present.",
        '"Today is my birthday," said {friend}, and {hero} had no present.',
        "The birthday of {friend} had come, and {hero} needed a present.",
    ],
    [
        "{hero} thought [for a long time|about it all day|hard].",
        '"What [can|shall] I give?" [asked|thought] {hero}.',
        "{hero} [looked|searched] everywhere at home, but nothing was good enough.",
        "{hero} wanted to [make|see] {friend} happy.",
    ],
    [
        "",
        "{friend} was [all alone|a little sad] and had [no toys|nothing to play with].",
        "{friend} [tried to smile|sat in a corner] and [waited|looked out of the window].",
        "{friend} had [often|always] liked {t}.",
    ],
    [
        "Then {hero} looked at {t} and [had|got] an idea.",
        "Then {hero} thought of {t}.",
        '"I know, my {noun}!" [said|thought|cried] {hero}.',
        "{hero} loved {t}, but {hero} loved {friend} more.",
    ],
    [
        "",
        "{hero} [put a bow on it|put it in soft paper] and [smiled|ran back].",
        "{hero} [brushed|cleaned] it until it was [bright|pretty].",
        "It was not easy, but {hero} [smiled|was sure].",
    ],
    [
        '"This is for you," said {hero}, and gave {t} to {friend}.',
        "So {hero} gave {t} to {friend} [with a smile|and sang a song].",
        "[With a smile|With both hands], {hero} gave {t} to {friend}.",
        '"Happy birthday," said {hero}, and [gave|handed] {t} to {friend}.',
    ],
    [
        '"Thank you, {hero}," [said|cried] {friend}[ happily|].',
        "{friend} [hugged|thanked] {hero} [and smiled|with a big smile|again and again].",
        '"This is the best present of all," said {friend}.',
        "{friend} [laughed|jumped|danced] with joy and [thanked|hugged] {hero}.",
    ],
    [
        "{hero} was [happy|glad] too.",
        "They [ate cake|sang|danced] [together|until it was dark].",
        "{hero} saw that giving [is fun|makes the heart warm].",
        "Then {hero} and {friend} ate [cake|sweet berries] together.",
    ],
    [
        "From that day on, {friend} [kept {t} close|loved {t}] and thought of {hero}.",
        (
            "From then on, {hero} and {friend} played with {t} together, for it was a gift "
            "of love."
        ),
        "And that is how {hero} gave {t} away and [got|won] a [best|true] friend.",
        (
            "Ever since that day, {t} has been the best present that {friend} ever got from "
            "{hero}."
        ),
        "That [night|evening], {friend} fell asleep with the present from {hero}, {t}.",
    ],
]

DIRTY = [
    OUT,
    WEATHER,
    [
        "But {he} [slipped|tripped], and {t} fell into the mud.",
        "Then {t} fell into a [big |deep |]puddle of mud.",
        "Suddenly {he} dropped {t}, and it landed in the mud.",
        "All at once, there was mud all over {t}, for {he} had slipped.",
        "{He} [jumped over a puddle|ran too fast], and {t} got full of mud.",
    ],
    [
        "It was [dirty|brown and dirty] [all over|from top to bottom].",
        "Now {t} was [very|all] dirty.",
        "What a [dirty|muddy] {noun} it was now.",
    ],
    [
        "",
        "{He} rubbed it with a leaf, but it only got worse.",
        "{He} tried to wipe it, but the mud [stayed|did not come off].",
    ],
    SAD,
    FRIEND_COMES,
    ASK,
    TELL,
    OFFER,
    [
        "{friend} [got|brought] a [bucket|tub] of [warm |]water and some soap.",
        "They [took|carried] it to the water and [looked for|got] some soap.",
        "{hero} got some water, and {friend} got some soap.",
        '"All we need is water and soap," said {friend}.',
    ],
    [
        "They [washed|scrubbed] and rubbed until {t} was clean [again|and bright].",
        "{hero} and {friend} washed {t} [with care|two times] until it was clean.",
        "[Together|Side by side], they washed {t}, and soon it was clean again.",
        "{friend} washed {t}, {hero} dried it, and then it was clean.",
    ],
    [
        "",
        "There were bubbles everywhere, and both [laughed|giggled].",
        "A [big |little |]bubble landed on the nose of {friend}.",
        "In the end they were [wet all over|wet but happy].",
    ],
    THANKS,
    JOY,
    FRIENDS_END
    + NIGHT_END
    + [
        "From that day on, {hero} kept {t} clean and [walked|went] around the mud.",
        "And that is how {hero} and {friend} washed {t} and became friends.",
        "After that day, {hero} and {friend} laughed about the mud when they saw {t}.",
    ],
]

RACE = [
    [
        f"{DAY}, {{hero}} met {{a_friend}} named {{friend}} near the {{place}}.",
        f"{DAY}, {{a_friend}} named {{friend}} came to [see|visit] {{hero}}.",
        f"{DAY}, {{a_friend}} named {{friend}} came by and [saw|liked] {{t}}.",
        f"{DAY}, {{hero}} [showed|was showing] {{t}} to {{a_friend}} named {{friend}}.",
    ],
    WEATHER,
    [
        '"Let us [have|run] a race," said {friend}.',
        '"I am faster than you, let us have a race," said {hero}.',
        '"Do you want to have a race?" asked {friend}.',
        "{hero} and {friend} wanted to have a race.",
    ],
    [
        '"The winner may [have|hold] {t} first," said {hero}.',
        "{hero} put {t} [on a stone|under a tree] as the prize.",
        "{T} [was|would be] the prize for the winner.",
        '"My {noun} is the prize," said {hero}.',
    ],
    [
        '"Ready, steady, go!" [called|shouted|cried] {hero}.',
        "[Off they went|Off they ran], [fast as the wind|over the grass|down the path].",
        "They [ran|raced] [over the grass|down the path|around the trees].",
    ],
    [
        "",
        "First {hero} was in front, and then {friend} was in front.",
        "The birds [watched|cheered] from the trees.",
        "Dust flew up [behind them|from the path].",
    ],
    [
        "Then {friend} [tripped over a root|stepped into a hole] and fell.",
        "But [half way|near the end], {friend} fell [and cried out|into the grass].",
        '"Ouch!" cried {friend}, who had tripped and lay [in the grass|on the path].',
        "Suddenly {friend} [slipped|tripped] and fell down.",
    ],
    [
        "{hero} [could have won|was far in front], but {hero} [stopped|ran back].",
        "{hero} [stopped at once|turned around] and ran back.",
        "{hero} did not think of the prize and ran back.",
    ],
    [
        '"Are you hurt?" asked {hero}.',
        "{hero} helped {friend} [up|to stand up].",
        '"Take my [hand|arm]," said {hero}.',
        '"Let me help you," said {hero} to {friend}.',
    ],
    [
        "[Hand in hand|Side by side|Slowly], {hero} and {friend} crossed the line together.",
        "So they finished the race [together|side by side|hand in hand].",
        "[Arm in arm|Side by side|Together], they reached the end of the race.",
        "They crossed the line at the same time, [hand in hand|side by side|laughing].",
    ],
    [
        '"We both won," said {hero}, and they held {t} together.',
        '"We are both winners," said {friend}, and they held {t} together.',
        "Both were winners, so {t} was [for both|for the two of them].",
        "{hero} and {friend} both [got|held] {t}, for both had won.",
    ],
    THANKS,
    JOY,
    [
        *FRIENDS_END,
        (
            "From that day on, {hero} and {friend} ran [every race|all races] together, "
            "with {t} as "
            "the prize."
        ),
        "And that is how {hero} and {friend} both won {t} in one race.",
        (
            "After that day, {t} [reminded|told] {hero} and {friend} of the race that both "
            "had won."
        ),
    ],
]

PLOTS = {
    "lost": (LOST, SMALL),
    "broken": (BROKEN, [*FRAGILE, "kite", "cart", "sled", "wagon"]),
    "shared": (SHARED, [*SMALL, "cart", "sled", "wagon"]),
    "high": (HIGH, CLOTH[1:] + LIGHT + ["umbrella"]),
    "heavy": (HEAVY, BIG),
    "forgotten": (FORGOTTEN, SMALL),
    "storm": (STORM, SMALL),
    "gift": (GIFT, SMALL),
    "dirty": (
        DIRTY,
        [*CLOTH, "ball", "basket", "boat", "book", "doll", "drum", "flag", "kite"],
    ),
    "race": (RACE, SMALL),
}

REQUESTS = [
    "Tell me a story about {a_kind} named {hero} and {a_thing}.",
    "Can you tell me a story about {a_kind} named {hero} and {a_thing}?",
    "Please write a [short |little |]story about {a_kind} named {hero} and {a_thing}.",
    "Write a [short |little |]story about {a_kind} named {hero} and {a_thing}.",
    "I would like [to hear |]a story about {a_kind} named {hero} with {a_thing}.",
    "A story about {a_kind} named {hero} and {a_thing}, please.",
    "Tell a story: {a_kind} named {hero}, {a_thing} and a friend named {friend}.",
    "Tell me about {hero} the {kind} and {a_thing}.",
]


@dataclass(frozen=True)
class Story:
    """One story, and what it is about.

    Attributes:
        opening: the first two sentences: hero, place and thing.
        text: the whole story; begins with `opening`.
        hero, friend: the names of the two characters.
        thing: the noun of the object the story is about, without adjective.
        place: the noun of the place.
        request: what a user could have asked for to get this story.
    """

    opening: str
    text: str
    hero: str
    friend: str
    thing: str
    place: str
    request: str


def write_story(rng: random.Random, held_out: bool = False) -> Story:
    """Write one story of about 70 to 170 words.

    Args:
        rng: the only source of chance.
        held_out: draw the combination of hero, kind and thing from the tenth that
            stories with `held_out=False` never use.
    """
    while True:
        slots, things = PLOTS[rng.choice(list(PLOTS))]
        thing = rng.choice(things)
        hero, hero_kind, hero_words = _character(rng)
        if is_held_out(hero, hero_kind, thing) == held_out:
            break
    while True:
        friend, friend_kind, friend_words = _character(rng)
        if friend != hero and friend_kind != hero_kind:
            break
    near = rng.choice([near for near, nouns in PLACES.items() for _ in nouns])
    place = rng.choice(PLACES[near])
    adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.7 else ""
    place_adjective = _say(rng, PLACE_ADJECTIVES, {})
    at_place = f"{near} {_with_article(place_adjective + place)}"
    a_hero = _with_article(
        rng.choice(["", "", "little ", "young ", "happy "]) + hero_kind
    )
    a_friend = _with_article(
        rng.choice(["", "", "kind ", "friendly ", "clever "]) + friend_kind
    )
    the_thing = f"the [{adjective}||]{thing}" if adjective else f"the {thing}"
    words = {
        "hero": hero,
        **hero_words,
        "friend": friend,
        "fhis": friend_words["his"],
        "kind": hero_kind,
        "a_kind": _with_article(hero_kind),
        "a_hero": a_hero,
        "A_hero": _capital(a_hero),
        "a_friend": a_friend,
        "A_friend": _capital(a_friend),
        "noun": thing,
        "a_thing": _with_article(adjective + thing),
        "t": the_thing,
        "T": _capital(the_thing),
        "place": place,
        "at_place": at_place,
        "At_place": _capital(at_place),
    }
    opening = " ".join(_say(rng, rng.choice(slot), words) for slot in (INTRODUCE, OWN))
    two_paragraphs = rng.random() < 0.15
    text = opening
    for slot in slots:
        if slot[0] == "" and rng.random() < 0.5:
            continue
        wording = rng.choice([option for option in slot if option])
        starts_paragraph = two_paragraphs and "_friend} named" in wording
        text += ("\n\n" if starts_paragraph else " ") + _say(rng, wording, words)
    if len(text.split()) > MAX_WORDS:
        return write_story(rng, held_out)
    request = _say(rng, rng.choice(REQUESTS), words)
    return Story(opening, text, hero, friend, thing, place, request)


def is_held_out(hero: str, kind: str, thing: str) -> bool:
    """Whether this combination is kept from training; the same on every machine."""
    return zlib.crc32(f"{hero}|{kind}|{thing}".encode()) % 10 == 0


def _character(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    """A name, a kind, and the pronouns that go with the name."""
    female = rng.random() < 0.5
    name = rng.choice(FEMALE if female else MALE)
    kind = rng.choice([*ANIMALS, "girl" if female else "boy"])
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return (
        name,
        kind,
        {"he": he, "He": _capital(he), "him": him, "his": his, "His": _capital(his)},
    )


def _say(rng: random.Random, wording: str, words: dict[str, str]) -> str:
    """Fill in the words, then settle every `[a|b]`, the innermost first."""
    sentence = wording.format_map(words)
    while "[" in sentence:
        sentence = re.sub(
            r"\[([^\[\]]*)\]", lambda m: rng.choice(m.group(1).split("|")), sentence
        )
    return sentence


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and noun[:3] != 'uni' else 'a'} {noun}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
