"""Words of a caption as coco-caption counts them: those of its Java tokenizer, without Java.

coco-caption runs Stanford CoreNLP 3.4.1's PTBTokenizer and drops punctuation afterwards. What that program does with a
text was observed, and the tests compare with its output. So its oddities are here too: brackets stay, as words, and so
do `!!` and `?!`; a full stop stays with an abbreviation, and in front of a comma.
"""

# ruff: noqa: RUF001 (typographic quotes and dashes are meant)

import regex

# What coco-caption drops. (Of a row of dots, hyphens or quotes each is a token here, and dropped as well.)
_PUNCTUATION = frozenset("'’\"`.?!,:;-")
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("“”«»", '"'),
        **dict.fromkeys("‘‹›", "`"),
        **dict.fromkeys("–—―…\u200b", " - "),
        **{"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "£": "#", "€": "$", "\xad": None},
    }
)

# Those of up to four letters were found by trying all; some are abbreviations only with a capital letter.
_ABBREVIATIONS = r"""
    adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|
    calif|capt|cf|cie|co|col|colo|comdr|cmdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|elec|ens|
    esq|est|etc|ext|feb|fla|fri|ft|ga|gen|govs?|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|
    kans?|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mrs?|ms|msgr|mt|mtg|
    natl|neb|nev|nov|oct|okla|penn|pfc|ph(?:\.d)?|plc|pres|profs?|ptes?|ptys?|pvt|rd|rep|reps|rev|rt|
    sen|sens|sept?|seq|sfc|sgt|spc|sq|sr|st|ste|supts?|sys|tel|tenn|thurs?|treas|tues?|univ|va|vs|
    vt|wed|wisc?|wm|wyo|(?-i:Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash)
"""
# A full stop between a single letter and one of these ends a sentence.
_FIRST_WORDS = (
    "A|After|An|And|As|At|But|He|Her|Here|However|If|In|It|Many|Now|One|Other|She|So|Some|That|The|Their|Then|There|"
    "These|They|This|We|What|When|While|You"
)

_LETTER, _CHARACTER = r"[\p{L}\p{M}]", r"[\p{L}\p{M}\p{Nd}]"
_TOKEN = regex.compile(
    rf"""
    (?P<contraction> n['’]t\b | ['’](?:s|d|m|ll|re|ve)\b )
  | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
  | {_LETTER}++ (?!\S)                                                       # a plain word, tried early as most are
  | \p{{L}}+ (?=n['’]t\b) | y['’](?=all\b) | ['’]t(?=(?:is|was)\b)
  | (?:https?://|www\.) \S*\w | [\w.+-]+ @ [\w-]+ (?:\.[\w-]+)*              # addresses
  | </?\p{{L}}[^<>]*> | [#@]{_LETTER}{_CHARACTER}* | [:;=]-?[()dp](?!\w)     # <person>, #tag, :-)
  | (?-i: [A-Z]+ (?:&[A-Z]+)+ )                                              # AT&T
  | ['’]n['’] | ['’](?:n|em|till?|cause|[2-9]0s)\b | ['’]\d\d(?=\s)          # rock 'n' roll, the '90s, in '08
  | (?:dunkin|ol|somethin)['’](?!\w) | (?:cap['’]n|ev['’]ry|li['’]l|nor['’]easter)\b
  | (?![iy]){_LETTER}['’]{_LETTER}{{2,}} | {_LETTER}*[aeiouy]['’][aeiou]{_LETTER}*   # o'clock, ma'am
  | (?: (?:{_LETTER}+-)? {_LETTER}(?:\.{_LETTER})+ | {_ABBREVIATIONS} ) \. (?: -{_LETTER}+ | (?!{_LETTER}) )
  | {_LETTER}\. (?! {_LETTER} | \s+(?-i:{_FIRST_WORDS})\b )
  | (?:nos?|art|figs?|prop|pp|op|ca)\. (?=\s*\d)                             # no. 7
  | {_CHARACTER}+\. (?=[,;:])
  | [-+]?\d*[.,]\d+ (?:[.,]\d+)* (?:-{_LETTER}+)* | \d*(?::\d+)+ | [-+]\d+(?::\d+)*  # 1,000; 2.5-inch; 12:30; -5
  | {_LETTER}{_CHARACTER}* (?:[.!?]{_LETTER}{_CHARACTER}*)+ (?:-{_CHARACTER}+)*      # cat.The, kept as one
  | {_CHARACTER}+ (?:[-_/]{_CHARACTER}+)*                                    # t-shirt, and/or, 9/11
  | _+ | \*+ | [!?]+
  | [^\s\U00010000-\U0010ffff]                                               # not emoji, which Java leaves out
    """,
    regex.VERBOSE | regex.IGNORECASE,
)


def tokenize_caption(caption: str) -> str:
    """Lower-case Penn Treebank tokens without punctuation, joined by spaces."""
    words = []
    for match in _TOKEN.finditer(caption.translate(_SPELLINGS)):
        token = match[0].lower()
        if match["contraction"]:
            token = token.replace("’", "'")
        if token not in _PUNCTUATION:
            words.append(token.translate(_BRACKETS))
    return " ".join(words)
