from gblm_compress.drawing import literal


def test_a_name_is_no_formula_and_holds_nothing_that_is_not_printable() -> None:
    assert literal("a$b$\n\x1b[31m") == r"a\$b\$" + "\ufffd\ufffd[31m"
    assert literal("4096×11008, größer") == "4096×11008, größer"
