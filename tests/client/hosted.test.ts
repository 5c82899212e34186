/** The client and the Worker as on Replicate: gateway.ts in front of the container, signed webhooks into D1. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test, { after, afterEach, before, beforeEach } from "node:test";
import { AbortError, PredictionError, RequestError, SeparationError, Separator, StemsError } from "music-separation";
import Replicate from "replicate";
import { Gateway, OFFICIAL, TOKEN } from "./gateway.js";
import { contents, dataUri, gatewayPort, longSongFile, plain, samples, songFile, until, uploading } from "./served.js";
import { createTables, runInWorker, startReceiver, type Receiver } from "./workerd.js";

let gateway: Gateway;
let receiver: Receiver;
let replicate: Replicate;
let server: { auth: string; baseUrl: string };
let separator: Separator;
let song: string;
let longSong: Blob;

before(async () => {
  gateway = new Gateway(uploading());
  await gateway.listen(gatewayPort());
  server = { auth: TOKEN, baseUrl: `${gateway.origin}/v1` };
  replicate = new Replicate(server);
  separator = new Separator({ model: OFFICIAL, ...server });
  receiver = await startReceiver((await replicate.webhooks.default.secret.get()).key);
  song = dataUri(await readFile(songFile()));
  longSong = new Blob([new Uint8Array(await readFile(longSongFile()))]);
});
after(async () => {
  await gateway.close();
  await receiver.close();
});
beforeEach(() => receiver.database.batch([receiver.database.prepare("DELETE FROM jobs")]));
afterEach(() => {
  gateway.uploadSeconds = () => 0;
  gateway.interfere = () => undefined;
});

/** The error of something that must fail with one. */
async function failure(failing: Promise<unknown>): Promise<SeparationError> {
  const error: unknown = await failing.then(() => undefined, (reason: unknown) => reason);
  assert.ok(error instanceof SeparationError, `it failed with ${error}`);
  return error;
}

test("by name: stems are not mixed up if their uploads end in another order", async () => {
  const direct = new Separator({ container: plain() });
  const expected = await contents(await direct.separate(song, { stems: "all_6", outputFormat: "flac" }));
  const order = ["piano", "bass", "other", "vocals", "guitar", "drums"];
  gateway.uploadSeconds = (stem) => order.indexOf(stem) * 0.25;

  const prediction = await replicate.predictions.create({
    model: OFFICIAL,
    input: { audio: song, stems: "all_6", output_format: "flac" },
    wait: 60,
  });
  const names = (prediction.output as string[]).map((url) => url.split("/").pop());
  assert.deepEqual(names, order.map((name) => `${name}.flac`));

  const stems = await separator.separate(song, { stems: "all_6", outputFormat: "flac", pollSeconds: 0.1 });
  assert.deepEqual(Object.keys(stems), ["vocals", "drums", "bass", "guitar", "piano", "other"]);
  assert.deepEqual(await contents(stems), expected);
  assert.equal(new Set(Object.values(expected)).size, 6);
});

test("by version: replicate.run and the client", async () => {
  const output = await replicate.run("owner/own:1", { input: { audio: song, output_format: "mp3" } });
  assert.equal((output as string[]).length, 2);
  const versioned = new Separator({ model: "owner/own:1", ...server });
  assert.ok((await versioned.separate(song, { twoStems: "bass", pollSeconds: 0.1 })).no_bass);
  assert.equal(gateway.newest.version, "1");
});

test("by deployment", async () => {
  const deployed = new Separator({ deployment: "owner/warm", ...server });
  assert.ok((await deployed.separate(song, { outputFormat: "mp3", pollSeconds: 0.1 })).vocals);
  assert.equal(gateway.newest.deployment, "owner/warm");
});

test("a model that is not official and has no version is an error that says what to write", async () => {
  const error = await failure(new Separator({ model: "owner/own", ...server }).separate(song));
  assert.match(error.message, /answered 404: .*: only official models run without a version, so write owner\/name:version/);
  assert.deepEqual([error.kind, (error as RequestError).httpStatus, error.predictionId], ["refused", 404, null]);
});

test("without a token, with two targets or a malformed one there is no separator", () => {
  const wrong: [ConstructorParameters<typeof Separator>[0], RegExp][] = [
    [{ model: "owner/name" }, /there is no token/],
    [{ model: "owner/name", deployment: "owner/name", auth: "x" } as never, /give one of model, deployment and container/],
    [{ auth: "x" } as never, /give one of/],
    [{ model: process.env["NO_SUCH_VARIABLE"]!, auth: "x" }, /give one of/],
    [{ model: "name", auth: "x" }, /the model is "name": write owner\/name:version/],
    [{ model: "owner/name:1/../files", auth: "x" }, /the model is/],
    [{ deployment: "owner/name:1", auth: "x" }, /the deployment is .*: write owner\/name/],
    [{ container: "localhost:5000" }, /the container is "localhost:5000": give a URL that begins with http:\/\/ or https:\/\//],
    [{ model: "owner/name", auth: "x", baseUrl: "" }, /the baseUrl is "": give a URL/],
    [{ model: "owner/name", auth: "x", baseUrl: "localhost:3000" }, /the baseUrl is "localhost:3000"/],
  ];
  for (const [options, message] of wrong) {
    assert.throws(() => new Separator(options), { name: "SeparationError", kind: "options", message });
  }
});

test("options of another case are refused before anything is sent", async () => {
  const before = gateway.created;
  const misspelt = await failure(separator.separate(new Blob(["x"]), { output_format: "mp3" } as object));
  assert.equal(misspelt.message, "there is no option output_format: write outputFormat");
  const unknown = await failure(separator.start(song, { shifts: 2 } as object));
  assert.match(unknown.message, /^there is no option shifts: use stems, outputFormat, /);
  assert.equal(gateway.created, before);
});

test("a song or a webhook that no server can reach is refused before anything is sent", async () => {
  const before = gateway.created;
  const routes: string[] = [];
  gateway.interfere = (route) => void routes.push(route);
  const direct = new Separator({ container: plain() });
  for (const wrong of ["/home/me/song.mp3", "file:///song.mp3", "blob:http://host/1", new URL("ftp://host/song.mp3"), "", null, undefined]) {
    for (const each of [separator, direct]) {
      const error = await failure(each.separate(wrong as string));
      assert.match(error.message, /^the song is (".*": give an http or https URL|neither a URL nor a file)/);
      assert.deepEqual([error.kind, error.predictionId], ["input", null]);
    }
  }
  for (const webhook of ["localhost:3000/stems", "/stems", ""]) {
    const error = await failure(separator.start(song, { webhook }));
    assert.equal(error.message, `the webhook is "${webhook}": give a URL that begins with http:// or https://`);
    assert.equal((await failure(direct.separate(song, { webhook }))).kind, "options");
  }
  assert.deepEqual([gateway.created, routes], [before, []]);
});

test("all options arrive under the container's names", async () => {
  const audio = `${gateway.origin}/files/none`; // the container finds nothing there
  await separator.start(new URL(audio), {
    stems: "all_4",
    outputFormat: "mp3",
    chunkSize: 10,
    overlap: 5,
    sampleRate: 48000,
    mp3Bitrate: 192,
    twoStems: undefined,
    recipe: "demo",
  });
  assert.deepEqual(gateway.newest.input, {
    audio,
    stems: "all_4",
    output_format: "mp3",
    chunk_size: 10,
    overlap: 5,
    sample_rate: 48000,
    mp3_bitrate: 192,
    recipe: "demo",
  });
});

test("a part of a song with its analysis: onAnalysis, get", async () => {
  const analyses: unknown[] = [];
  let id = "";
  const { vocals } = await separator.separate(song, {
    start: 0.5,
    end: 2,
    analyse: true,
    pollSeconds: 0.1,
    onStart: (started) => (id = started),
    onAnalysis: (analysis) => analyses.push(analysis),
  });
  assert.ok(vocals);
  const { analysis } = await separator.get(id);
  assert.ok(analysis !== null && analysis.loudnessLufs !== null && analysis.loudnessLufs < 0);
  assert.deepEqual(analyses, [analysis]);
  assert.deepEqual(gateway.newest.input, { audio: song, start: 0.5, end: 2, analyse: true });
});

test("after start, another process waits for the stems by the prediction's id", async () => {
  const id = await separator.start(song, { stems: "all_4", outputFormat: "mp3" });
  const other = new Separator({ model: OFFICIAL, ...server });
  const shares: number[] = [];
  const onProgress = (share: number): void => void shares.push(share);
  const four = await other.wait(id, { stems: "all_4", pollSeconds: 0.1, onProgress });
  assert.deepEqual(Object.keys(four), ["vocals", "drums", "bass", "other"]);
  assert.equal(shares.at(-1), 1);
  assert.deepEqual(await other.wait(id), four);
  assert.deepEqual(await other.get(id), { id, status: "succeeded", progress: 1, stems: four, analysis: null, error: null });
  const error = await failure(other.wait(id, { twoStems: "vocals" }));
  assert.ok(error instanceof StemsError);
  assert.equal(error.message, "expected the stems vocals, no_vocals, got " + namesOf(gateway.newest.output));
  assert.deepEqual([error.kind, error.predictionId], ["stems", id]);
});

test("get tells how far a prediction is", async () => {
  const id = await separator.start(longSong, { outputFormat: "flac" });
  const running = await until(async () => {
    const state = await separator.get(id);
    return state.progress > 0.1 ? state : undefined;
  });
  assert.deepEqual({ ...running, progress: 0 }, { id, status: "processing", progress: 0, stems: null, analysis: null, error: null });
  assert.ok(running.progress < 1);
  await separator.cancel(id);
  const { status, error } = await until(async () => {
    const state = await separator.get(id);
    return state.error ? state : undefined;
  });
  assert.equal(status, "canceled");
  assert.ok(error instanceof PredictionError);
  assert.deepEqual([error.kind, error.predictionId], ["canceled", id]);
  await separator.cancel(id); // has no effect any more
});

test("the prediction's id is known while it runs", async () => {
  let seen: string | undefined;
  const onStart = (id: string): void => {
    seen = `${id} ${gateway.newest.id} ${gateway.newest.completed_at}`;
  };
  await separator.separate(song, { outputFormat: "mp3", pollSeconds: 0.1, onStart });
  assert.equal(seen, `${gateway.newest.id} ${gateway.newest.id} undefined`);
});

test("a POST whose connection drops makes one prediction and is an error", async () => {
  const before = gateway.created;
  gateway.interfere = (route) => (route.endsWith("/predictions") ? "drop" : undefined);
  const error = await failure(separator.separate(song, { outputFormat: "mp3" }));
  assert.ok(error instanceof RequestError);
  assert.deepEqual([error.kind, error.httpStatus, error.predictionId], ["connection", null, null]);
  assert.match(error.message, /no complete answer from 127\.0\.0\.1:\d+ \(socket hang up\): the prediction may have been made/);
  assert.equal(gateway.created, before + 1);
  await separator.cancel(gateway.newest.id).catch((reason: unknown) => assert.fail(String(reason)));
});

test("lost answers to polls are polled again, and refused creations are not", async () => {
  let polls = 0;
  gateway.interfere = (route) => {
    if (!route.startsWith("GET")) return undefined;
    return ["drop" as const, 503, 429][polls++];
  };
  assert.ok((await separator.separate(song, { outputFormat: "mp3", pollSeconds: 0.1 })).vocals);
  assert.ok(polls > 3);
  const before = gateway.created;
  let creations = 0;
  gateway.interfere = () => (creations++ === 0 ? 429 : 503);
  const error = await failure(separator.start(song));
  assert.deepEqual([error.kind, error.message], ["server", `${new URL(gateway.origin).host} answered 503: the test interferes`]);
  assert.deepEqual([creations, gateway.created], [2, before]);
});

test("an error while waiting has the prediction's id, so that one can wait again", async () => {
  gateway.interfere = (route) => (route.startsWith("GET") ? 403 : undefined);
  const error = await failure(separator.separate(song, { outputFormat: "mp3" }));
  assert.deepEqual([error.kind, error.predictionId], ["refused", gateway.newest.id]);
  gateway.interfere = () => undefined;
  assert.ok((await separator.wait(error.predictionId!, { stems: "vocals_instrumental", pollSeconds: 0.1 })).vocals);
});

test("an abort during the upload, or just after it, makes no prediction", async () => {
  const before = gateway.created;
  const abort = new AbortController();
  gateway.interfere = (route) => (route === "POST /v1/files" ? abort.abort("gone") : undefined);
  for (const start of [separator.separate(longSong, { signal: abort.signal }), separator.start(longSong, { signal: abort.signal })]) {
    const error = await failure(start);
    assert.ok(error instanceof AbortError);
    assert.deepEqual([error.kind, error.cause, error.predictionId], ["aborted", "gone", null]);
  }
  assert.equal(gateway.created, before);
});

test("an abort while the prediction is made cancels it", async () => {
  for (const method of ["separate", "start"] as const) {
    const abort = new AbortController();
    gateway.interfere = (route) => (route.endsWith("/predictions") ? abort.abort() : undefined);
    const error = await failure(separator[method](longSong, { signal: abort.signal }));
    assert.deepEqual([error.name, error.predictionId], ["AbortError", gateway.newest.id]);
    await until(() => (gateway.newest.status === "canceled" ? true : undefined));
  }
});

test("an abort while waiting for a started prediction cancels it", async () => {
  const id = await separator.start(longSong, { outputFormat: "flac" });
  const abort = new AbortController();
  const waiting = failure(separator.wait(id, { pollSeconds: 60, signal: abort.signal }));
  await until(() => gateway.running());
  abort.abort();
  assert.deepEqual([(await waiting).kind, (await waiting).predictionId], ["aborted", id]);
  await until(() => (gateway.newest.status === "canceled" ? true : undefined));
});

test("your own fetch sends everything", async () => {
  const urls: string[] = [];
  const own = new Separator({ model: OFFICIAL, ...server, fetch: (url, init) => (urls.push(url), fetch(url, init)) });
  await own.separate(new Blob([new Uint8Array(await readFile(songFile()))]), { outputFormat: "mp3", pollSeconds: 0.1 });
  const routes = urls.map((url) => url.replace(gateway.origin, "").replace(/[0-9a-z]{26}/, "ID"));
  assert.deepEqual(new Set(routes), new Set(["/v1/files", `/v1/models/${OFFICIAL}/predictions`, "/v1/predictions/ID"]));
});

test("replicate.run returns nothing if the song takes longer than its wait; the client keeps waiting", async () => {
  const wait = { mode: "block", timeout: 1 } as const;
  assert.equal(await replicate.run(OFFICIAL, { input: { audio: longSong }, wait }), null);
  await replicate.predictions.cancel(await until(() => gateway.running()));
});

test("progress rises to 1 while the client waits", async () => {
  const shares: number[] = [];
  const onProgress = (share: number): void => void shares.push(share);
  await separator.separate(longSong, { outputFormat: "mp3", pollSeconds: 0.1, onProgress });
  assert.ok(shares.length >= 3, `only ${shares.join(" ")}`);
  assert.ok(shares[0]! > 0 && shares[0]! < 0.5);
  assert.equal(shares.at(-1), 1);
  assert.deepEqual(shares, [...new Set(shares)].sort((a, b) => a - b));
});

test("a song as a Blob or as bytes is uploaded and gives the same stems as its data URI", async () => {
  const bytes = await readFile(songFile());
  const options = { outputFormat: "flac", pollSeconds: 0.1 } as const;
  const expected = await samples(await separator.separate(song, options));
  const copy = new Uint8Array(bytes);
  for (const file of [new Blob([copy]), new File([copy], "my song.flac"), copy, bytes, copy.buffer]) {
    assert.deepEqual(await samples(await separator.separate(file, options)), expected);
  }
});

test("start: the signed final webhook stores the stems' URLs in D1", async () => {
  const id = await separator.start(song, { stems: "all_4", outputFormat: "mp3", webhook: receiver.url });
  const deliveries = await gateway.webhooksOf(id);
  assert.deepEqual(deliveries.map(({ event, answer }) => [event, answer]), [["completed", 200]]);
  const [row, ...others] = await receiver.rows();
  assert.deepEqual([row!.replicate_id, row!.status, row!.error, others], [id, "succeeded", null, []]);
  const stems: Record<string, string> = JSON.parse(row!.stems!);
  assert.deepEqual(Object.keys(stems).sort(), ["bass", "drums", "other", "vocals"]);
  for (const [name, url] of Object.entries(stems)) assert.ok(url.endsWith(`/${name}.mp3`));
  assert.equal(new Set(Object.values(await contents(stems))).size, 4);
});

test("after the webhooks of every stage, the row is that of the final one", async () => {
  const { id } = await replicate.predictions.create({
    model: OFFICIAL,
    input: { audio: longSong, output_format: "mp3" },
    webhook: receiver.url,
    webhook_events_filter: ["start", "output", "logs", "completed"],
  });
  const deliveries = await gateway.webhooksOf(id);
  assert.deepEqual(new Set(deliveries.map(({ event }) => event)), new Set(["start", "output", "logs", "completed"]));
  assert.deepEqual(new Set(deliveries.map(({ answer }) => answer)), new Set([200]));
  assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status]), [[id, "succeeded"]]);
});

test("a webhook that could not be stored is retried and then stored", async () => {
  await receiver.database.prepare("DROP TABLE jobs").run();
  const id = await separator.start(song, { outputFormat: "mp3", webhook: receiver.url });
  await until(() => gateway.deliveries.find(({ webhookId, answer }) => webhookId.includes(id) && answer === 500));
  await createTables(receiver.database);
  const deliveries = await gateway.webhooksOf(id);
  assert.equal(deliveries.at(-1)!.answer, 200);
  assert.equal(new Set(deliveries.map(({ webhookId }) => webhookId)).size, 1);
  assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status]), [[id, "succeeded"]]);
});

test("a webhook repeats the inputs, so the Worker refuses one with a large data URI", async () => {
  const [inline, uploaded] = [dataUri(Buffer.from(await longSong.arrayBuffer())), longSong];
  const failing = { chunkSize: 4, overlap: 8, webhook: receiver.url };
  const answers = [];
  for (const each of [inline, uploaded]) {
    answers.push((await gateway.webhooksOf(await separator.start(each, failing))).at(-1)!.answer);
  }
  assert.notEqual(answers[0], 200); // 413, or the connection was closed during the upload
  assert.equal(answers[1], 200);
  assert.equal((await receiver.rows()).length, 1);
});

test("a failed prediction has the container's sentence and kind in the client, and the sentence in D1", async () => {
  const failing = { chunkSize: 4, overlap: 8, webhook: receiver.url };
  const error = await failure(separator.separate(song, { ...failing, pollSeconds: 0.1 }));
  assert.ok(error instanceof PredictionError);
  assert.match(String(gateway.newest.error), /^(Prediction failed: )+(Async prediction failed: )?InputError: overlap/);
  assert.match(error.message, /^overlap \(8 s\) must be smaller than the chunk size \(4 s\)/);
  assert.deepEqual([error.kind, error.predictionId], ["input", gateway.newest.id]);
  await gateway.webhooksOf(error.predictionId);
  const [row] = await receiver.rows();
  assert.deepEqual(row, { replicate_id: error.predictionId, status: "failed", stems: null, error: error.message });
});

test("a song that is not audio fails with its kind", async () => {
  const error = await failure(separator.separate(new Blob(["no song"]), { pollSeconds: 0.1 }));
  assert.match(error.message, /^'\S+' is not audio/);
  assert.equal(error.kind, "audio");
});

test("a recipe that the server does not have fails with its kind", async () => {
  const error = await failure(separator.separate(song, { recipe: "standard", pollSeconds: 0.1 }));
  assert.match(error.message, /^recipe 'standard' is not on this server/);
  assert.equal(error.kind, "recipe");
});

test("aborting cancels the prediction in the container and does not affect the next", async () => {
  const abort = new AbortController();
  const reason = new Error("the user left");
  const waiting = separator.separate(longSong, {
    outputFormat: "flac",
    pollSeconds: 0.1,
    signal: abort.signal,
    webhook: receiver.url,
    onProgress: (share) => share > 0.1 && abort.abort(reason),
  });
  const error = await failure(waiting);
  assert.deepEqual([error.kind, error.cause], ["aborted", reason]);
  const { webhookId } = await until(() => gateway.deliveries.find(({ status }) => status === "canceled"));
  const id = webhookId.split("_")[1]!;
  assert.equal(error.predictionId, id);
  assert.equal((await replicate.predictions.get(id)).status, "canceled");
  assert.deepEqual(await receiver.rows(), [{ replicate_id: id, status: "canceled", stems: null, error: `prediction ${id} was canceled` }]);
  assert.ok((await separator.separate(song, { pollSeconds: 0.1 })).vocals);
});

test("a prediction that somebody else cancels is an error, even in the queue", async () => {
  const first = separator.separate(longSong, { outputFormat: "flac", pollSeconds: 0.1, webhook: receiver.url });
  const running = await until(() => gateway.running());
  const queued = await separator.start(song, { outputFormat: "mp3", webhook: receiver.url });
  assert.equal((await replicate.predictions.cancel(queued)).status, "canceled");
  const row = await until(async () => (await receiver.rows()).find(({ replicate_id }) => replicate_id === queued));
  assert.equal(row.status, "canceled");
  await replicate.predictions.cancel(running);
  const message = `prediction ${running} was canceled`;
  await assert.rejects(first, { name: "PredictionError", kind: "canceled", predictionId: running, message });
});

test("an aborted signal starts no prediction and uploads nothing", async () => {
  const before = gateway.created;
  const routes: string[] = [];
  gateway.interfere = (route) => void routes.push(route);
  for (const each of [song, longSong]) {
    assert.equal((await failure(separator.separate(each, { signal: AbortSignal.abort() }))).kind, "aborted");
  }
  assert.deepEqual([gateway.created, routes], [before, []]);
});

test("a wrong token and an unknown prediction are clear errors", async () => {
  const stranger = new Separator({ ...server, model: OFFICIAL, auth: "r8_wrong" });
  const refused = await failure(stranger.separate(song));
  assert.deepEqual([refused.kind, (refused as RequestError).httpStatus], ["refused", 401]);
  assert.match(refused.message, /answered 401: You did not pass a valid token$/);
  const unknown = await failure(separator.wait("none"));
  assert.match(unknown.message, /answered 404: Prediction not found$/);
  assert.equal(unknown.predictionId, "none");
});

test("a prediction whose stems Replicate has deleted is an error that says so", async () => {
  const id = await separator.start(song, { outputFormat: "mp3" });
  await separator.wait(id, { pollSeconds: 0.1 });
  Object.assign(gateway.newest, { data_removed: true, input: {}, output: null });
  const error = await failure(separator.wait(id));
  assert.ok(error instanceof StemsError);
  assert.match(error.message, new RegExp(`^the stems of prediction ${id} have been deleted`));
});

for (const flags of [[], ["nodejs_compat"]]) {
  test(`the client runs in a Worker with ${flags.join() || "no"} flags`, async () => {
    const options = JSON.stringify({ model: OFFICIAL, ...server });
    const inputs = JSON.stringify({ outputFormat: "mp3", webhook: receiver.url });
    const code = `const separator = new Separator(${options});
      const song = await (await fetch(${JSON.stringify(song)})).blob();
      const id = await separator.start(song, ${inputs});
      return Response.json([id, await separator.wait(id, { pollSeconds: 0.1 })]);`;
    const [id, stems] = JSON.parse(await runInWorker(code, flags)) as [string, object];
    assert.deepEqual(Object.keys(stems), ["vocals", "instrumental"]);
    await gateway.webhooksOf(id);
    assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status]), [[id, "succeeded"]]);
  });
}

function namesOf(output: string[]): string {
  return output.map((url) => url.split("/").at(-1)!.split(".")[0]).join(", ");
}
