/** Code that must not compile: tsc fails unless each line after "@ts-expect-error" is an error. Nothing here runs. */
import { Separator } from "./separation.js";

export async function checkedByTheCompiler(separator: Separator, song: string): Promise<void> {
  const byDefault = await separator.separate(song);
  ({ vocals: "", instrumental: "" }) satisfies typeof byDefault;
  // @ts-expect-error vocals_instrumental has no drums
  byDefault.drums;

  const four = await separator.separate(song, { stems: "all_4", output_format: "mp3", mp3_bitrate: 192 });
  ({ vocals: "", drums: "", bass: "", other: "" }) satisfies typeof four;
  // @ts-expect-error all_4 has no guitar
  four.guitar;
  // @ts-expect-error a stem's URL is never undefined
  four.vocals satisfies undefined;

  const six = await separator.separate(song, { stems: "all_6" });
  six.piano satisfies string;
  // @ts-expect-error only vocals_instrumental has an instrumental
  six.instrumental;

  const kit = await separator.separate(song, { stems: "drum_kit", recipe: "standard" });
  ({ kick: "", snare: "", toms: "", hihat: "", cymbals: "" }) satisfies typeof kit;
  // @ts-expect-error drum_kit has no drums
  kit.drums;

  const two = await separator.separate(song, { stems: "all_4", two_stems: "drums" });
  two.no_drums satisfies string;
  // @ts-expect-error two_stems replaces stems
  two.bass;
  (await separator.separate(song, { two_stems: "guitar" })).no_guitar satisfies string;
  // @ts-expect-error two_stems does not offer pieces of the drum kit
  await separator.separate(song, { two_stems: "kick" });

  const either = await separator.separate(song, { stems: song ? "all_4" : "all_6" });
  either.drums satisfies string;
  // @ts-expect-error only one of the two choices has this stem
  either.guitar;

  // @ts-expect-error no such choice
  await separator.separate(song, { stems: "all_5" });
  // @ts-expect-error no such format
  await separator.separate(song, { output_format: "ogg" });
  // @ts-expect-error no such rate
  await separator.separate(song, { sample_rate: 22050 });
  // @ts-expect-error no such bitrate
  await separator.separate(song, { mp3_bitrate: 160 });
  // @ts-expect-error no such recipe
  await separator.separate(song, { recipe: "best" });
  // @ts-expect-error no such input
  await separator.separate(song, { shifts: 2 });
  // @ts-expect-error a number is not a song
  await separator.separate(1);
  // @ts-expect-error start needs a webhook
  await separator.start(song, { stems: "all_4" });
  // @ts-expect-error a model needs an owner
  new Separator({ model: "separation" });
}
