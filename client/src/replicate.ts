import { AbortError, RequestError, SeparationError } from "./errors.js";
import type { ApiInput } from "./inputs.js";
import type { Service, StartOptions, Watch } from "./service.js";
import { urlOrFile, type Song } from "./song.js";
import { httpUrl, pause, type Transport } from "./transport.js";

const SECONDS = 60; // for any answer that has not to wait for an upload

/** Replicate's API: predictions by version, by official model or by deployment. */
export class Replicate implements Service {
  readonly #transport: Transport;
  readonly #api: string;
  readonly #path: string;
  readonly #version: { version?: string };

  /**
   * @param model "owner/name:version", or "owner/name" for official models; or else
   * @param deployment "owner/name"
   */
  constructor(transport: Transport, api: string, target: { model: string } | { deployment: string }) {
    this.#transport = transport;
    this.#api = httpUrl(api, "baseUrl");
    if ("deployment" in target) {
      const { name } = parsed(target.deployment, /^(?<name>[\w.-]+\/[\w.-]+)$/, "deployment", "owner/name");
      this.#path = `deployments/${name}/predictions`;
      this.#version = {};
      return;
    }
    const pattern = /^(?<name>[\w.-]+\/[\w.-]+)(?::(?<version>\w+))?$/;
    const { name, version } = parsed(target.model, pattern, "model", "owner/name:version");
    this.#path = version === undefined ? `models/${name}/predictions` : "predictions";
    this.#version = version === undefined ? {} : { version };
  }

  async start(song: Song, input: ApiInput, { webhook, signal }: StartOptions): Promise<string> {
    const file = urlOrFile(song);
    const audio = typeof file === "string" ? file : await this.#upload(file, signal);
    if (signal?.aborted) throw new AbortError(signal, null);
    const hook = webhook === undefined ? {} : { webhook, webhook_events_filter: ["completed"] };
    const body = JSON.stringify({ ...this.#version, input: { audio, ...input }, ...hook });
    // Without the signal: if this call were cut off, nobody would know the id of the prediction to cancel.
    const id = idOf(await this.#create(body));
    if (signal?.aborted) await this.#abort(id, signal);
    return id;
  }

  async run(
    song: Song,
    input: ApiInput,
    { webhook, signal, onStart, ...watch }: StartOptions & Watch & { onStart: (id: string) => void },
  ): Promise<unknown> {
    const id = await this.start(song, input, { webhook, signal });
    onStart(id);
    return this.wait(id, { signal, ...watch });
  }

  async wait(id: string, { signal, onPoll, pollSeconds }: { signal?: AbortSignal | undefined } & Watch): Promise<unknown> {
    for (;;) {
      if (signal?.aborted) return this.#abort(id, signal);
      const prediction = await this.#poll(id, signal);
      if (onPoll(prediction)) return prediction;
      await pause(pollSeconds, signal);
    }
  }

  get(id: string, signal: AbortSignal | undefined): Promise<unknown> {
    const url = `${this.#api}/predictions/${encodeURIComponent(id)}`;
    return this.#transport.repeat({ method: "GET", url, signal, seconds: SECONDS, predictionId: id });
  }

  async cancel(id: string): Promise<void> {
    const url = `${this.#api}/predictions/${encodeURIComponent(id)}/cancel`;
    await this.#transport.repeat({ method: "POST", url, seconds: SECONDS, predictionId: id });
  }

  async #create(body: string): Promise<unknown> {
    try {
      return await this.#transport.once({ method: "POST", url: `${this.#api}/${this.#path}`, body, seconds: SECONDS });
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      const { kind, httpStatus, message } = error;
      if (kind === "connection") {
        const text = `${message}: the prediction may have been made, so look for it before you start another`;
        throw new RequestError(text, kind, { cause: error });
      }
      if (httpStatus === 404 && this.#path.startsWith("models/")) {
        const text = `${message}: only official models run without a version, so write owner/name:version`;
        throw new RequestError(text, kind, { httpStatus, cause: error });
      }
      throw error;
    }
  }

  async #upload(file: Blob, signal: AbortSignal | undefined): Promise<string> {
    const form = new FormData();
    form.append("content", file, (file as Partial<File>).name ?? "song");
    form.append("metadata", new Blob(["{}"], { type: "application/json" }));
    const encoded = new Response(form);
    const headers = { "content-type": encoded.headers.get("content-type")! };
    const body = new Uint8Array(await encoded.arrayBuffer());
    // Twice the same upload costs nothing.
    const answer = await this.#transport.repeat({ method: "POST", url: `${this.#api}/files`, headers, body, signal });
    const url = (answer as { urls?: { get?: unknown } } | null)?.urls?.get;
    if (typeof url !== "string") throw new RequestError("the answer to the upload has no URL", "server", {});
    return url;
  }

  /** Gets a prediction; an aborted signal cancels it. */
  async #poll(id: string, signal: AbortSignal | undefined): Promise<unknown> {
    try {
      return await this.get(id, signal);
    } catch (error) {
      if (error instanceof AbortError && signal) return this.#abort(id, signal);
      throw error;
    }
  }

  async #abort(id: string, signal: AbortSignal): Promise<never> {
    await this.cancel(id);
    throw new AbortError(signal, id);
  }
}

function parsed(text: unknown, pattern: RegExp, name: string, form: string): Record<string, string | undefined> {
  const groups = typeof text === "string" ? pattern.exec(text)?.groups : undefined;
  if (!groups) throw new SeparationError(`the ${name} is ${JSON.stringify(text)}: write ${form}`, "options");
  return groups;
}

function idOf(prediction: unknown): string {
  const id = (prediction as { id?: unknown } | null)?.id;
  if (typeof id !== "string") throw new RequestError("the answer is not a prediction", "server", {});
  return id;
}
