import { Container } from "./container.js";
import { RequestError, SeparationError } from "./errors.js";
import { apiInput, type Inputs } from "./inputs.js";
import { isOver, readPrediction, type Separation } from "./prediction.js";
import { Replicate } from "./replicate.js";
import type { Service, StartOptions, WaitOptions, Watch } from "./service.js";
import type { Song } from "./song.js";
import type { SomeStemUrls, StemsChoice, StemUrls, TwoStems } from "./stems.js";
import { httpUrl, Transport, type Fetch } from "./transport.js";

/** One of `model`, `deployment` and `container`, and how to reach it. */
export type SeparatorOptions = (
  | {
      /** "owner/name:version", or "owner/name" for Replicate's official models. */
      model: string;
      deployment?: undefined;
      container?: undefined;
    }
  | {
      /** "owner/name" of a deployment on Replicate. */
      deployment: string;
      model?: undefined;
      container?: undefined;
    }
  | {
      /** The URL of a container outside Replicate, such as "http://localhost:5000". */
      container: string;
      model?: undefined;
      deployment?: undefined;
    }
) & {
  /** The token. Default: the environment variable REPLICATE_API_TOKEN; none for a container. */
  auth?: string | undefined;
  /** The URL of Replicate's API. */
  baseUrl?: string | undefined;
  /** Sends all requests, for example through your proxy. Node's own gives up on answers that take five minutes. */
  fetch?: Fetch | undefined;
};

export interface SeparateOptions extends StartOptions, WaitOptions {
  /** Called with the prediction's id as soon as there is one. */
  onStart?: ((predictionId: string) => void) | undefined;
}

/** The choice of stems of a prediction that was started earlier. It gives the result its type, and is checked. */
export type Choice<S extends StemsChoice, T extends TwoStems> =
  | { stems: S; twoStems?: T | undefined }
  | { stems?: S | undefined; twoStems: T };

/**
 * Separates songs with the container, on Replicate or elsewhere.
 *
 *     const separator = new Separator({ deployment: "owner/name" });
 *     const { vocals, drums } = await separator.separate(songUrl, { stems: "all_4", outputFormat: "mp3" });
 *
 * Every error is a SeparationError with a `kind` and a `predictionId`.
 */
export class Separator {
  readonly #service: Service;

  /** @throws SeparationError if an option is not usable. */
  constructor({ model, deployment, container, auth, baseUrl, fetch }: SeparatorOptions) {
    if ([model, deployment, container].filter((target) => target !== undefined).length !== 1) {
      throw new SeparationError("give one of model, deployment and container", "options");
    }
    if (container !== undefined) {
      this.#service = new Container(new Transport(auth, fetch), container);
      return;
    }
    const token = auth ?? (typeof process === "undefined" ? undefined : process.env["REPLICATE_API_TOKEN"]);
    if (!token) throw new SeparationError("there is no token: give auth, or set REPLICATE_API_TOKEN", "options");
    const api = baseUrl ?? "https://api.replicate.com/v1";
    this.#service = new Replicate(new Transport(token, fetch), api, deployment !== undefined ? { deployment } : { model: model! });
  }

  /**
   * Separates a song and waits for its stems, however long it takes.
   *
   * @throws PredictionError if the prediction failed, or somebody else canceled it.
   * @throws StemsError if its stems are not the requested ones.
   * @throws RequestError if a request is refused or lost. No request that makes a prediction is repeated after that.
   * @throws AbortError if the signal is aborted.
   */
  async separate<S extends StemsChoice = "vocals_instrumental", T extends TwoStems = "none">(
    song: Song,
    options: Inputs<S, T> & SeparateOptions = {},
  ): Promise<StemUrls<S, T>> {
    const { webhook, signal, onStart = () => undefined, onProgress, onAnalysis, pollSeconds, ...inputs } = options;
    const input = apiInput(inputs);
    if (webhook !== undefined) httpUrl(webhook, "webhook");
    const watch = watching({ onProgress, pollSeconds }, input);
    const prediction = await this.#service.run(song, input, { webhook, signal, onStart, ...watch });
    watch.onPoll(prediction);
    return stemsOf(read(prediction, input), onAnalysis) as StemUrls<S, T>;
  }

  /**
   * Starts a separation and returns the prediction's id, for `wait`, `get`, `cancel` or a webhook.
   *
   * @throws RequestError if a request is refused or lost.
   * @throws AbortError if the signal is aborted.
   */
  async start(song: Song, { webhook, signal, ...inputs }: Inputs & StartOptions = {}): Promise<string> {
    const input = apiInput(inputs);
    if (webhook !== undefined) httpUrl(webhook, "webhook");
    return this.#service.start(song, input, { webhook, signal });
  }

  /**
   * The present state of a prediction on Replicate. A failure is its `error`; it is not thrown.
   *
   * @throws RequestError if a request is refused or lost.
   */
  async get<S extends StemsChoice, T extends TwoStems = "none">(
    id: string,
    choice: Choice<S, T>,
  ): Promise<Separation<StemUrls<S, T>>>;
  async get(id: string): Promise<Separation>;
  async get(id: string, choice?: Choice<StemsChoice, TwoStems>): Promise<Separation> {
    return read(await this.#service.get(id, undefined), choice && apiInput(choice), id);
  }

  /**
   * Waits for the stems of a prediction on Replicate that was started earlier, perhaps by another process.
   *
   * @throws SeparationError as `separate` does.
   */
  async wait<S extends StemsChoice, T extends TwoStems = "none">(
    id: string,
    options: Choice<S, T> & WaitOptions,
  ): Promise<StemUrls<S, T>>;
  async wait(id: string, options?: WaitOptions): Promise<SomeStemUrls>;
  async wait(id: string, options: Inputs & WaitOptions = {}): Promise<SomeStemUrls> {
    const { signal, onProgress, onAnalysis, pollSeconds, ...choice } = options;
    const input = Object.keys(choice).length > 0 ? apiInput(choice) : undefined;
    const watch = watching({ onProgress, pollSeconds }, input);
    return stemsOf(read(await this.#service.wait(id, { signal, ...watch }), input, id), onAnalysis);
  }

  /** Cancels a prediction. One that has ended stays as it is. */
  async cancel(id: string): Promise<void> {
    await this.#service.cancel(id);
  }
}

function watching({ onProgress, pollSeconds = 1 }: WaitOptions, input: object | undefined): Watch {
  let share = 0;
  const onPoll = (prediction: unknown): boolean => {
    const found = read(prediction, input);
    if (found.progress > share) onProgress?.((share = found.progress));
    return isOver(found);
  };
  return { onPoll, pollSeconds };
}

function read(prediction: unknown, input: object | undefined, predictionId: string | null = null): Separation {
  const found = readPrediction(prediction, input);
  if (found === null) throw new RequestError("the answer is not a prediction", "server", { predictionId });
  return found;
}

function stemsOf({ id, stems, analysis, error }: Separation, onAnalysis: WaitOptions["onAnalysis"]): SomeStemUrls {
  if (error !== null) throw error;
  if (analysis !== null) onAnalysis?.(analysis);
  if (stems === null) throw new RequestError("the answer is a prediction that has not ended", "server", { predictionId: id });
  return stems;
}
