/** Stems are identified by their file names in any order. No server is needed. */
import assert from "node:assert/strict";
import test from "node:test";
import { stemsByName, StemsError } from "music-separation";

const SIX = ["vocals", "drums", "bass", "guitar", "piano", "other"];
const url = (name: string): string => `https://replicate.delivery/xezq/Zf3/${name}.flac?Expires=1&Signature=/bass.wav`;

test("six stems are identified by name in all 720 orders, and returned in the contract's", () => {
  const right = Object.fromEntries(SIX.map((name) => [name, url(name)]));
  const orders = (names: string[]): string[][] =>
    names.length > 0
      ? names.flatMap((first) => orders(names.filter((name) => name !== first)).map((rest) => [first, ...rest]))
      : [[]];
  const all = orders(SIX);
  assert.equal(all.length, 720);
  for (const order of all) {
    const stems = stemsByName(order.map(url), SIX);
    assert.deepEqual(stems, right);
    assert.deepEqual(Object.keys(stems), SIX);
  }
});

test("missing, duplicate, unknown or nameless stems are an error that lists the stems", () => {
  for (const [names, got] of [
    [["vocals"], "vocals"],
    [["vocals", "vocals"], "vocals, vocals"],
    [["vocals", "drums", "instrumental"], "vocals, drums, instrumental"],
    [["vocals", "toString"], "vocals, (no name)"],
    [["vocals", "__proto__"], "vocals, __proto__"],
    [[], "none"],
  ] as const) {
    const message = `expected the stems vocals, instrumental, got ${got}`;
    assert.throws(() => stemsByName(names.map(url), ["vocals", "instrumental"]), { name: "StemsError", message });
  }
  for (const nothing of [null, undefined, "https://host/vocals.wav", [1, 2], {}]) {
    assert.throws(() => stemsByName(nothing, ["vocals"]), StemsError);
  }
});

test("data URIs are accepted only if there is exactly one for each stem", () => {
  const [one, two] = ["data:audio/wav;base64,AAAA", "data:audio/wav;base64,BBBB"];
  assert.deepEqual(stemsByName([one, two], ["vocals", "instrumental"]), { vocals: one, instrumental: two });
  assert.throws(() => stemsByName([one], ["vocals", "instrumental"]), /got \(no name\)/);
  assert.throws(() => stemsByName([url("vocals"), one], ["vocals", "instrumental"]), /got vocals, \(no name\)/);
});
