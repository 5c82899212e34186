/** Code that must and must not compile: each line after "@ts-expect-error" is an error. Nothing here runs. */
import { PredictionError, SeparationError, Separator, type Separation, type StemUrls } from "music-separation";
import { receiveWebhook, type Webhook } from "music-separation/webhook";

declare const environment: { MODEL?: string; TOKEN?: string };

export async function checkedByTheCompiler(separator: Separator, song: string, id: string): Promise<void> {
  const byDefault = await separator.separate(song);
  ({ vocals: "", instrumental: "" }) satisfies typeof byDefault;
  // @ts-expect-error vocals_instrumental has no drums
  byDefault.drums;

  const four = await separator.separate(song, { stems: "all_4", outputFormat: "mp3", mp3Bitrate: 192 });
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

  const two = await separator.separate(song, { stems: "all_4", twoStems: "drums" });
  two.no_drums satisfies string;
  // @ts-expect-error twoStems replaces stems
  two.bass;
  (await separator.separate(song, { twoStems: "guitar" })).no_guitar satisfies string;
  // @ts-expect-error twoStems does not offer pieces of the drum kit
  await separator.separate(song, { twoStems: "kick" });

  const either = await separator.separate(song, { stems: song ? "all_4" : "all_6" });
  either.drums satisfies string;
  // @ts-expect-error only one of the two choices has this stem
  either.guitar;

  await separator.separate(song, { preview: true, onAnalysis: ({ tempoBpm }) => tempoBpm satisfies number | null });

  // @ts-expect-error no such choice
  await separator.separate(song, { stems: "all_5" });
  // @ts-expect-error no such format
  await separator.separate(song, { outputFormat: "ogg" });
  // @ts-expect-error no such rate
  await separator.separate(song, { sampleRate: 22050 });
  // @ts-expect-error no such bitrate
  await separator.separate(song, { mp3Bitrate: 160 });
  // @ts-expect-error no such recipe
  await separator.separate(song, { recipe: "best" });
  // @ts-expect-error no such input
  await separator.separate(song, { shifts: 2 });
  // @ts-expect-error options are in camel case
  await separator.separate(song, { output_format: "mp3" });
  // @ts-expect-error a number is not a song
  await separator.separate(1);
  for (const file of [new Blob([]), new Uint8Array(8), new ArrayBuffer(8), new URL(song)]) await separator.separate(file);
}

export async function startedEarlier(separator: Separator, song: string, id: string): Promise<void> {
  (await separator.start(song)) satisfies string;
  (await separator.start(song, { stems: "all_4", webhook: "https://example.com" })) satisfies string;
  // @ts-expect-error progress is for those who wait
  await separator.start(song, { onProgress: () => undefined });

  const some = await separator.wait(id, { pollSeconds: 5 });
  some.guitar satisfies string | undefined;
  // @ts-expect-error the compiler does not know which stems there are
  some.vocals satisfies string;
  // @ts-expect-error there is no such stem
  some.flute;
  const four = await separator.wait(id, { stems: "all_4", signal: AbortSignal.timeout(1000) });
  four.drums satisfies string;
  // @ts-expect-error all_4 has no guitar
  four.guitar;
  (await separator.wait(id, { twoStems: "bass" })).no_bass satisfies string;
  // @ts-expect-error inputs are chosen at the start
  await separator.wait(id, { outputFormat: "mp3" });

  const state = await separator.get(id);
  state.error satisfies SeparationError | null;
  // @ts-expect-error there may be no stems yet
  state.stems.vocals;
  const typed = await separator.get(id, { stems: "all_6" });
  if (typed.stems !== null) typed.stems.piano satisfies string;
  typed satisfies Separation<StemUrls<"all_6", "none">>;
  await separator.cancel(id);
}

export function made(auth: string): Separator[] {
  // @ts-expect-error one of model, deployment and container
  new Separator({ auth });
  // @ts-expect-error not two
  new Separator({ model: "owner/name", container: "http://localhost:5000" });
  // @ts-expect-error it may be undefined
  new Separator({ model: environment.MODEL });
  return [
    new Separator({ model: environment.MODEL!, auth: environment.TOKEN }),
    new Separator({ deployment: "owner/name", auth, baseUrl: undefined }),
    new Separator({ container: "http://localhost:5000", fetch }),
  ];
}

export function caught(error: unknown): string {
  if (error instanceof PredictionError) error.predictionId satisfies string;
  if (!(error instanceof SeparationError)) throw error;
  error.predictionId satisfies string | null;
  // @ts-expect-error there may be no prediction
  error.predictionId satisfies string;
  // @ts-expect-error no such kind
  if (error.kind === "unknown") return "";
  return error.kind === "audio" ? error.message : error.kind;
}

export async function received(request: Request): Promise<Webhook> {
  // @ts-expect-error the secret is required
  await receiveWebhook(request);
  const { separation } = await receiveWebhook(request, "whsec_");
  separation.stems?.drums satisfies string | undefined;
  return { id: "", sentAt: 0, separation };
}
