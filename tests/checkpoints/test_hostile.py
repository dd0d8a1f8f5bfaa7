"""Wrong answers of a hub: one sentence, nothing outside the cache, bounded time and bytes."""

import json

import pytest
from helpers.hubs import COMMIT, HOSTILE, client, hostile_cases, sentence


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_hub_is_one_sentence_and_touches_nothing_outside_the_cache(
    tiny_hub, tmp_path, name
):
    fault, args = HOSTILE[name]
    victim = tmp_path / "victim"
    victim.write_text("mine")
    tiny_hub.reset(fault)
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    done = client(tiny_hub.url, home, *args)
    if fault.get("harmless"):
        assert done.rc == 0, done.stderr
    else:
        sentence(done)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "victim"}
    assert victim.read_text() == "mine"


def test_a_damaged_shard_that_links_out_of_the_cache_is_not_deleted(tiny_hub, tmp_path):
    tiny_hub.reset()
    assert client(tiny_hub.url, tmp_path, "analyze", "org/tiny", "-q").rc == 0
    (link,) = (tmp_path / "hf").rglob("*00003-of-00003.safetensors")
    outside = tmp_path / "outside"
    outside.write_bytes(link.read_bytes()[:-1])
    link.unlink()
    link.symlink_to(outside)
    said = sentence(client(tiny_hub.url, tmp_path, "analyze", "org/tiny", "-q", "-o", "x.json"))
    assert "lies outside the cache" in said
    assert outside.exists()


def test_every_way_a_listing_can_be_wrong_is_a_sentence(tiny_hub):
    """In process, by the listing's own reader."""
    from helpers.hubs import listing_of

    from htsr_alloc.errors import HtsrError

    assert listing_of(json.dumps({"sha": COMMIT, "siblings": []}).encode()) == (COMMIT, [], {})
    for text in hostile_cases():
        with pytest.raises(HtsrError):
            listing_of(text)
