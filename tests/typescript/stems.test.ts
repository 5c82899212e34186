/** Stems are identified by their file names in any order. No server is needed. */
import assert from "node:assert/strict";
import test from "node:test";
import { expectedStems, stemsByName, StemsError } from "./separation.js";

const SIX = ["vocals", "drums", "bass", "guitar", "piano", "other"];
const url = (name: string): string => `https://replicate.delivery/xezq/Zf3/${name}.flac?Expires=1&Signature=/bass.wav`;

test("six stems are identified by name in all 720 orders", () => {
  const right = Object.fromEntries(SIX.map((name) => [name, url(name)]));
  const orders = (names: string[]): string[][] =>
    names.length > 0
      ? names.flatMap((first) => orders(names.filter((name) => name !== first)).map((rest) => [first, ...rest]))
      : [[]];
  const all = orders(SIX);
  assert.equal(all.length, 720);
  for (const order of all) assert.deepEqual({ ...stemsByName(order.map(url), SIX) }, right);
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

test("the expected stems follow from the inputs and the container's defaults", () => {
  assert.deepEqual(expectedStems({}), ["vocals", "instrumental"]);
  assert.deepEqual(expectedStems({ stems: "all_6" }), SIX);
  assert.deepEqual(expectedStems({ stems: "all_6", two_stems: "none" }), SIX);
  assert.deepEqual(expectedStems({ stems: "drum_kit" }), ["kick", "snare", "toms", "hihat", "cymbals"]);
  assert.deepEqual(expectedStems({ stems: "all_6", two_stems: "bass" }), ["bass", "no_bass"]);
  for (const stems of ["all_5", "toString"]) {
    assert.throws(() => expectedStems({ stems }), { name: "StemsError", message: `unknown choice of stems: ${stems}` });
  }
});
