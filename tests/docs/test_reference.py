from docs.write_reference import README, with_reference


def test_readmes_config_reference_is_what_the_models_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_reference(text) == text, "run `make docs`"
