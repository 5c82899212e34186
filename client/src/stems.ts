import { StemsError } from "./errors.js";

const STEMS = {
  vocals_instrumental: ["vocals", "instrumental"],
  all_4: ["vocals", "drums", "bass", "other"],
  all_6: ["vocals", "drums", "bass", "guitar", "piano", "other"],
  drum_kit: ["kick", "snare", "toms", "hihat", "cymbals"],
} as const;

export type StemsChoice = keyof typeof STEMS;
export type TwoStems = "none" | "vocals" | "drums" | "bass" | "other" | "guitar" | "piano";

/** The URL of each stem by its name, in the order of the contract. The names follow from the inputs. */
export type StemUrls<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> = T extends "none"
  ? S extends StemsChoice
    ? Record<(typeof STEMS)[S][number], string>
    : never
  : Record<T | `no_${T}`, string>;

/** The name of any stem. */
export type StemName = (typeof STEMS)[StemsChoice][number] | `no_${Exclude<TwoStems, "none">}`;

/** The URLs of stems whose choice is not known to the compiler. */
export type SomeStemUrls = Partial<Record<StemName, string>>;

/** The names of the stems for a prediction's inputs, in the order of the contract. Inputs have the API's names. */
export function expectedStems(inputs: { stems?: unknown; two_stems?: unknown }): readonly string[] {
  const stems = String(inputs.stems ?? "vocals_instrumental");
  const twoStems = String(inputs.two_stems ?? "none");
  if (twoStems !== "none") return [twoStems, `no_${twoStems}`];
  if (!Object.hasOwn(STEMS, stems)) throw new StemsError(`unknown choice of stems: ${stems}`);
  return STEMS[stems as StemsChoice];
}

/**
 * A prediction's output by stem, in the order of `expected`. File names identify the stems, because the list has the
 * order in which the uploads happened to end.
 *
 * A container outside Replicate returns data URIs, which have no names. It encodes the files one after another, so only
 * in this case the list's order counts.
 *
 * @throws StemsError if the names are not exactly the expected ones.
 */
export function stemsByName<Name extends string>(output: unknown, expected: readonly Name[]): Record<Name, string> {
  if (!Array.isArray(output) || !output.every((url) => typeof url === "string")) {
    throw new StemsError(`the prediction's output is not a list of URLs: ${JSON.stringify(output)?.slice(0, 200)}`);
  }
  const urls: string[] = output;
  const nameless = urls.length === expected.length && urls.every((url) => url.startsWith("data:"));
  const names: readonly string[] = nameless ? expected : urls.map(fileStem);
  if (names.length !== expected.length || !expected.every((name) => names.includes(name))) {
    throw new StemsError(`expected the stems ${expected.join(", ")}, got ${names.join(", ") || "none"}`);
  }
  return Object.fromEntries(expected.map((name) => [name, urls[names.indexOf(name)]])) as Record<Name, string>;
}

/** "vocals" for "https://host/path/vocals.wav?query", and "(no name)" for a URL that is not a stem's. */
function fileStem(url: string): string {
  const path = URL.canParse(url) ? new URL(url).pathname : "";
  return /\/([a-z_]+)\.(?:wav|mp3|flac)$/.exec(path)?.[1] ?? "(no name)";
}
