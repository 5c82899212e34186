/** The client and the Worker as on Replicate: gateway.ts in front of the container, signed webhooks into D1. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test, { after, afterEach, before, beforeEach } from "node:test";
import Replicate from "replicate";
import { Gateway, TOKEN } from "./gateway.js";
import { PredictionError, Separator } from "./separation.js";
import { contents, dataUri, gatewayPort, longSongFile, plain, samples, songFile, uploading } from "./served.js";
import { createTables, runInWorker, startReceiver, type Receiver } from "./workerd.js";

let gateway: Gateway;
let receiver: Receiver;
let replicate: Replicate;
let separator: Separator;
let song: string;
let longSong: Blob;

before(async () => {
  gateway = new Gateway(uploading());
  await gateway.listen(gatewayPort());
  const server = { auth: TOKEN, baseUrl: `${gateway.origin}/v1` };
  replicate = new Replicate(server);
  separator = new Separator({ model: "owner/separation", ...server });
  receiver = await startReceiver((await replicate.webhooks.default.secret.get()).key);
  song = dataUri(await readFile(songFile()));
  longSong = new Blob([new Uint8Array(await readFile(longSongFile()))]);
});
after(async () => {
  await gateway.close();
  await receiver.close();
});
beforeEach(() => receiver.database.batch([receiver.database.prepare("DELETE FROM jobs")]));
afterEach(() => void (gateway.uploadSeconds = () => 0));

test("by name: stems are not mixed up if their uploads end in another order", async () => {
  const inputs = { stems: "all_6", output_format: "flac" } as const;
  const direct = new Separator({ model: "owner/separation:any", auth: "unused", baseUrl: plain() });
  const expected = await contents(await direct.separate(song, inputs));
  const order = ["piano", "bass", "other", "vocals", "guitar", "drums"];
  gateway.uploadSeconds = (stem) => order.indexOf(stem) * 0.25;

  const prediction = await replicate.predictions.create({
    model: "owner/separation",
    input: { audio: song, ...inputs },
    wait: 60,
  });
  const names = (prediction.output as string[]).map((url) => url.split("/").pop());
  assert.deepEqual(names, order.map((name) => `${name}.flac`));

  const stems = await separator.separate(song, { ...inputs, pollSeconds: 0.1 });
  assert.deepEqual(await contents(stems), expected);
  assert.equal(new Set(Object.values(expected)).size, 6);
});

test("by version: replicate.run and the client", async () => {
  const output = await replicate.run("owner/separation:1", { input: { audio: song, output_format: "mp3" } });
  assert.equal((output as string[]).length, 2);
  const versioned = new Separator({ model: "owner/separation:1", auth: TOKEN, baseUrl: `${gateway.origin}/v1` });
  assert.ok((await versioned.separate(song, { two_stems: "bass", pollSeconds: 0.1 })).no_bass);
});

test("replicate.run returns nothing if the song takes longer than its wait; the client keeps waiting", async () => {
  const wait = { mode: "block", timeout: 1 } as const;
  assert.equal(await replicate.run("owner/separation", { input: { audio: longSong }, wait }), null);
  await replicate.predictions.cancel(await until(() => gateway.running()));
});

test("progress rises from less than a half to 1 while the client waits", async () => {
  const shares: number[] = [];
  const onProgress = (share: number): void => void shares.push(share);
  await separator.separate(longSong, { output_format: "mp3", pollSeconds: 0.1, onProgress });
  assert.ok(shares.length >= 3, `only ${shares.join(" ")}`);
  assert.ok(shares[0]! < 0.5);
  assert.equal(shares.at(-1), 1);
  assert.deepEqual(shares, [...new Set(shares)].sort((a, b) => a - b));
});

test("a song as a Blob or as bytes is uploaded and gives the same stems as its data URI", async () => {
  const bytes = await readFile(songFile());
  const options = { output_format: "flac", pollSeconds: 0.1 } as const;
  const expected = await samples(await separator.separate(song, options));
  for (const file of [new Blob([new Uint8Array(bytes)]), new Uint8Array(bytes), Buffer.from(new Uint8Array(bytes))]) {
    assert.deepEqual(await samples(await separator.separate(file, options)), expected);
  }
});

test("start: the signed final webhook stores the stems' URLs in D1", async () => {
  const id = await separator.start(song, { stems: "all_4", output_format: "mp3", webhook: receiver.url });
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
    model: "owner/separation",
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
  const id = await separator.start(song, { output_format: "mp3", webhook: receiver.url });
  await until(() => gateway.deliveries.find(({ webhookId, answer }) => webhookId.includes(id) && answer === 500));
  await createTables(receiver.database);
  const deliveries = await gateway.webhooksOf(id);
  assert.equal(deliveries.at(-1)!.answer, 200);
  assert.equal(new Set(deliveries.map(({ webhookId }) => webhookId)).size, 1);
  assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status]), [[id, "succeeded"]]);
});

test("a webhook repeats the inputs, so the Worker refuses one with a large data URI", async () => {
  const [inline, uploaded] = [dataUri(Buffer.from(await longSong.arrayBuffer())), longSong];
  const failing = { chunk_size: 4, overlap: 8, webhook: receiver.url };
  const answers = [];
  for (const each of [inline, uploaded]) {
    answers.push((await gateway.webhooksOf(await separator.start(each, failing))).at(-1)!.answer);
  }
  assert.notEqual(answers[0], 200); // 413, or the connection was closed during the upload
  assert.equal(answers[1], 200);
  assert.equal((await receiver.rows()).length, 1);
});

test("a failed prediction has the container's message in the client and in D1", async () => {
  const message = /InputError: .*overlap.*/;
  const failing = { chunk_size: 4, overlap: 8, webhook: receiver.url };
  const error: unknown = await separator.separate(song, { ...failing, pollSeconds: 0.1 }).catch((reason) => reason);
  assert.ok(error instanceof PredictionError);
  assert.equal(error.status, "failed");
  assert.match(error.message, message);
  await gateway.webhooksOf(error.predictionId);
  const [row] = await receiver.rows();
  assert.deepEqual(row, { replicate_id: error.predictionId, status: "failed", stems: null, error: error.message });
});

test("a song that is not audio fails with a message", async () => {
  await assert.rejects(separator.separate(new Blob(["no song"]), { pollSeconds: 0.1 }), /AudioError: /);
});

test("aborting cancels the prediction in the container and does not affect the next", async () => {
  const abort = new AbortController();
  const reason = new Error("the user left");
  const waiting = separator.separate(longSong, {
    output_format: "flac",
    pollSeconds: 0.1,
    signal: abort.signal,
    webhook: receiver.url,
    onProgress: (share) => share > 0.1 && abort.abort(reason),
  });
  await assert.rejects(waiting, reason);
  const { webhookId } = await until(() => gateway.deliveries.find(({ status }) => status === "canceled"));
  const id = webhookId.split("_")[1]!;
  assert.equal((await replicate.predictions.get(id)).status, "canceled");
  assert.deepEqual(await receiver.rows(), [{ replicate_id: id, status: "canceled", stems: null, error: null }]);
  assert.ok((await separator.separate(song, { pollSeconds: 0.1 })).vocals);
});

test("a prediction that somebody else cancels is an error, even in the queue", async () => {
  const first = separator.separate(longSong, { output_format: "flac", pollSeconds: 0.1, webhook: receiver.url });
  const running = await until(() => gateway.running());
  const queued = await separator.start(song, { output_format: "mp3", webhook: receiver.url });
  assert.equal((await replicate.predictions.cancel(queued)).status, "canceled");
  const row = await until(async () => (await receiver.rows()).find(({ replicate_id }) => replicate_id === queued));
  assert.equal(row.status, "canceled");
  await replicate.predictions.cancel(running);
  const message = `prediction ${running} was canceled`;
  await assert.rejects(first, { name: "PredictionError", status: "canceled", message });
});

test("an aborted signal starts no prediction", async () => {
  const before = gateway.created;
  await assert.rejects(separator.separate(song, { signal: AbortSignal.abort() }), { name: "AbortError" });
  assert.equal(gateway.created, before);
});

test("a wrong token and an unknown prediction are clear errors", async () => {
  const stranger = new Separator({ model: "owner/separation", auth: "r8_wrong", baseUrl: `${gateway.origin}/v1` });
  await assert.rejects(stranger.separate(song), /status 401/);
  await assert.rejects(replicate.predictions.get("none"), /status 404/);
});

test("the client runs in a Worker without Node's modules", async () => {
  const server = JSON.stringify({ model: "owner/separation", auth: TOKEN, baseUrl: `${gateway.origin}/v1` });
  const inputs = JSON.stringify({ output_format: "mp3", webhook: receiver.url });
  const id = await runInWorker(`const separator = new Separator(${server});
    const song = await (await fetch(${JSON.stringify(song)})).blob();
    return new Response(await separator.start(song, ${inputs}));`);
  await gateway.webhooksOf(id);
  assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status]), [[id, "succeeded"]]);
});

async function until<T>(look: () => T | undefined | Promise<T | undefined>): Promise<T> {
  for (const end = Date.now() + 60_000; Date.now() < end; ) {
    const found = await look();
    if (found !== undefined) return found;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error("it did not happen within a minute");
}
