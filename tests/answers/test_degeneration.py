"""Which completions say nothing: loops of every length and script, and texts with loops that say something."""

import pytest

from shipsfast.answers.judges.degeneration import degenerate, in_loops, letters_of
from tests.support.completions import ANSWER, LIMIT

REFRAIN = (
    "The {} went out to sea, to sea,\nHey ho, the wind and the rain,\nAnd never came back to me, to me,\n"
    "Hey ho, the wind and the rain.\n"
)
SAYS_SOMETHING = {
    "an answer": ANSWER,
    "one word": "ok",
    "one digit": "7",
    "a trillion": "1000000000000",
    "a third": "0.3333333333333333",
    "binary": "1111111111111111",
    "hexadecimal": "ffffffff is the largest, 00000000 the smallest, and the mask is ffff0000.",
    "a large price": "The kettle costs 1000000000000 pennies.",
    "yes, yes, yes": "Yes, yes, yes!",
    "no, no, no, no": "No, no, no, no.",
    "a laugh": "ha ha ha ha ha",
    "a song": "Row, row, row your boat, gently down the stream.",
    "a lullaby": "Hush, hush, hush, little lamb,\nla la la la la la,\nsleep in the hay till the morning is calm,\nla la la la la la.",
    "a birthday": "Happy birthday to you, happy birthday to you, happy birthday, dear Ada, happy birthday to you!",
    "a refrain": "".join(map(REFRAIN.format, ("miller", "baker", "piper"))),
    "a chorus": "We rise, we rise, we rise again,\nthe river knows our name.\nWe rise, we rise, we rise again,\nno two days are the same.",
    "said twice": "kettle lantern " * 2,
    "steps": "\n".join(f"{i}. Take step {i} of the mill" for i in range(9)),  # documented: they change
    "bullets": "\n".join(
        f"- {word}" for word in ("flour", "salt", "water", "yeast", "oil", "sugar", "honey")
    ),
    "a weekly plan": "Mon 9-5\nTue 9-5\nWed 9-5\nThu 9-5\nFri 9-5\nSat closed\nSun closed",
    "a multiplication table": "\n".join(f"3 x {i} = {3 * i}" for i in range(1, 10)),
    "columns": "day,tool\n" + "\n".join(f"{i},lamp" for i in range(1, 8)),
    "a table": f"| tool | place | price |\n{'|----------------' * 3}|\n| lamp | mill | 3 |\n| ladle | inn | 4 |",
    "a form": "\n".join(f"{name}: {'_' * 28}" for name in ("Name", "Date", "Place")),
    "a drawing": f" /\\_/\\ \n( o.o )\n > ^ <\n{'=' * 26}\n{'|' * 26}\n the cat of the mill",
    "loops of code": "for i in range(3):\n    for j in range(3):\n        for k in range(3):\n            print(i, j, k)",
    "zeros": "grid = [[0, 0, 0, 0, 0, 0, 0, 0],\n [0, 1, 0, 0, 0, 0, 0, 0],\n [0, 0, 0, 0, 0, 0, 0, 0]]\nprint(len(grid))",
    "json": '{"a": null, "b": null, "c": null, "d": [1, 1, 1], "name": "mill"}',
    "dna": "The sequence reads ATGATGATGCCGTTAGCATTAGC and codes for the mill's own yeast.",
    "thanks": "Thank you so much! " + "\N{PARTY POPPER}" * 24,
    "Thai": "แมวนั่งอยู่บนหลังคาของโรงสีเก่า มองดูพระจันทร์ที่ส่องแสงเหนือทุ่งนา และรอจนกว่าเช้าจะมาถึง",
    "Chinese": "磨坊后面挂着一盏旧灯笼,每到傍晚,孩子们便围坐在灯下听老人讲故事。",
    "Chinese pairs": "慢慢来,慢慢看,慢慢想,天天都有好时光。",
    "Japanese": "水車小屋の裏には古い灯籠が掛かっていて、夕方になると子どもたちが集まって話を聞きます。",
    "Japanese pairs": "ドキドキ、ワクワク、キラキラした夏祭りの夜でした。",
    "Korean": "물레방앗간 뒤에는 오래된 등불이 걸려 있고 저녁이면 아이들이 모여 이야기를 듣습니다.",
    "Russian": "За мельницей висит старый фонарь, и вечером под ним собираются дети.",
    "Arabic": "خلف الطاحونة فانوس قديم يجتمع الأطفال حوله كل مساء",
    "Hindi": "चक्की के पीछे एक पुरानी लालटेन टंगी है और शाम को बच्चे वहाँ कहानी सुनते हैं।",
    "a short loop at the end": ANSWER + " " + "so " * 12,
    "half a surrogate pair": "\ud800" + ANSWER,
}
SAYS_NOTHING = {
    "signs": "!?",
    "invisible": "\u200b\ufeff",
    "words": "the the the the the the the the",
    "five words": "the the the the the",
    "capitals": "The THE the tHe the the the the",
    "23 characters": "a" * 23,
    "23 characters after a prefix": "Sure, here: " + "a" * 23,
    "23 Chinese ones after a prefix": "好的,这是答案:" + "啊" * 23,
    "23 Chinese ones after an English prefix": "Sure, here is the answer: " + "啊" * 23,
    "short words": "so so so so so so",
    "cut short": "lantern lantern lantern lan",
    "phrases": "kettle lantern " * 3,
    "sentences": "A unit of many words, all about the kettle and the lantern. " * 3,
    "one loop after another": "so " * 20 + "moon " * 20,
    "two short loops": "so " * 7 + "moon " * 7,
    "a loop longer than the answer": ANSWER + " " + "so " * 60,
    "Japanese": "月の石を" * 3,
    "Korean": "네" * 8,
    "Thai": "แมว" * 5,
    "Russian": "да " * 7,
    "digits": "Sure " + "1" * 46,
    "blanks": "Sure " + "_" * 36,
    "exclamation": "Sure! " + "!" * 60,
    "emoji": "Ok " + "\N{GRINNING FACE}" * 40,
    "lines": "Answer\n\n\n\n: the\nthe\nthe\nthe\nthe\nthe",
}


@pytest.mark.parametrize("name", SAYS_SOMETHING)
def test_texts_that_say_something(name):
    text = SAYS_SOMETHING[name]
    assert not degenerate(text, len(text.split()), LIMIT)


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_texts_that_say_nothing(name):
    text = SAYS_NOTHING[name]
    assert degenerate(text, len(text.split()), LIMIT)


def test_a_limit_spent_on_next_to_nothing_is_degenerate():
    text = "Sure\n\n\n\n."
    assert degenerate(text, LIMIT, LIMIT)
    assert not degenerate(text, LIMIT - 1, LIMIT)
    assert not degenerate("Sure", 1, 1)
    assert not degenerate("कृष्ण की लालटेन", LIMIT, LIMIT)


def test_what_is_a_loop():
    def looping(text):
        return int(in_loops(text, letters_of(text)).sum())

    assert looping("xyzw" + "abcdefgh" * 4 + "abc") == 35  # its cut end included
    assert looping("") == looping("abc") == 0
    # 12 letters, an ideograph is two of them, a digit half of one; 24 signs
    assert [looping("a" * n) for n in (11, 12)] == [0, 12]
    assert [looping("啊" * n) for n in (5, 6)] == [0, 6]
    assert [looping("1" * n) for n in (23, 24)] == [0, 24]
    assert [looping("_" * n) for n in (23, 24)] == [0, 24]
    assert [looping("kettle " * n) for n in (2, 3)] == [0, 21]


def test_loops_are_found_in_time():
    text = ANSWER * 1000  # 80,000 characters
    assert degenerate(text, 20000, 20000)
