/**
 * The parts of Replicate's API that the tests need in front of a container: the /v1 routes, a queue, file uploads, the
 * delivery of stems, and signed webhooks. For tests only: it accepts one fixed token and keeps everything in memory.
 *
 * The container is the real coglet, started with `--upload-url {origin}/upload`.
 */
import { createHmac, randomBytes, randomUUID } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import type { FileObject, Prediction, WebhookEventType } from "replicate";

export const TOKEN = "r8_for_tests";
/** The only model that runs without a version. */
export const OFFICIAL = "owner/separation";

/** An attempt to send a webhook. `answer` is the response's status, or 0 if the connection failed. */
export interface Delivery {
  webhookId: string;
  event: WebhookEventType;
  status: Prediction["status"];
  answer: number;
}

interface Job {
  prediction: Prediction & { logs: string };
  /** Whether the container has it, or is about to. */
  isSent: boolean;
  canceled: Promise<void>;
  over: Promise<void>;
  end: () => void;
  /** The webhooks of a prediction are sent one after another. */
  webhooks: Promise<void>;
}

const ATTEMPTS = 6;

export class Gateway {
  readonly secret = `whsec_${randomBytes(24).toString("base64")}`;
  readonly deliveries: Delivery[] = [];
  /** Seconds that the upload of a stem takes; with it, tests choose the order in which uploads end. */
  uploadSeconds: (stem: string) => number = () => 0;
  /**
   * Called before each request of a client, with its method and path. A status is answered at once; "drop" cuts the
   * connection after the request has taken effect.
   */
  interfere: (route: string) => number | "drop" | void | Promise<void> = () => undefined;

  readonly #coglet: string;
  readonly #server: Server;
  readonly #jobs = new Map<string, Job>();
  readonly #files = new Map<string, { name: string; bytes: Buffer; type: string }>();
  #queue: Promise<void> = Promise.resolve();

  /** @param coglet the container's URL, such as http://127.0.0.1:5000 */
  constructor(coglet: string) {
    this.#coglet = coglet;
    this.#server = createServer((request, response) => {
      this.#route(request, response).catch((error: unknown) => send(response, 500, { detail: String(error) }));
    });
  }

  async listen(port: number): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(port, "127.0.0.1", resolve));
  }

  async close(): Promise<void> {
    await this.#queue;
    for (const job of this.#jobs.values()) await Promise.all([job.webhooks, job.canceled]);
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  get origin(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** The number of predictions created so far. */
  get created(): number {
    return this.#jobs.size;
  }

  /** The prediction that was created last. */
  get newest(): Prediction {
    return [...this.#jobs.values()].at(-1)!.prediction;
  }

  /** The prediction that is running. */
  running(): string | undefined {
    return [...this.#jobs.values()].find(({ prediction }) => prediction.status === "processing")?.prediction.id;
  }

  /** Waits for the end of a prediction and of its webhooks, and returns their deliveries. */
  async webhooksOf(id: string): Promise<Delivery[]> {
    const job = this.#jobs.get(id)!;
    await job.over;
    await job.webhooks;
    return this.deliveries.filter((delivery) => delivery.webhookId.startsWith(`msg_${id}_`));
  }

  async #route(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks);
    const path = new URL(request.url!, this.origin).pathname;
    const route = `${request.method} ${path}`;
    let match: RegExpExecArray | null;

    // For the container: its inputs, its stems and its webhooks.
    if ((match = /^GET (\/(?:files|delivery)\/.+)$/.exec(route))) {
      const file = this.#files.get(match[1]!);
      if (!file) return send(response, 404, { detail: "no such file" });
      response.writeHead(200, { "content-type": file.type, "content-length": file.bytes.length }).end(file.bytes);
      return;
    }
    if ((match = /^PUT \/upload\/([^/]+)$/.exec(route))) {
      const at = `/delivery/${request.headers["x-prediction-id"]}/${match[1]}`;
      this.#files.set(at, { name: match[1]!, bytes: body, type: request.headers["content-type"]! });
      await sleep(this.uploadSeconds(match[1]!.split(".")[0]!) * 1000);
      response.writeHead(201, { location: this.origin + at }).end();
      return;
    }
    if ((match = /^POST \/coglet\/([^/]+)$/.exec(route))) {
      this.#update(this.#jobs.get(match[1]!)!, JSON.parse(body.toString()));
      response.writeHead(200).end();
      return;
    }

    // For the client.
    const interference = await this.interfere(route);
    if (interference === "drop") {
      response.end = (() => void request.socket.destroy()) as unknown as typeof response.end;
    } else if (interference !== undefined) {
      response.setHeader("retry-after", "0");
      return send(response, interference, { detail: "the test interferes", status: interference });
    }
    if (request.headers.authorization !== `Bearer ${TOKEN}`) {
      return send(response, 401, { title: "Unauthenticated", detail: "You did not pass a valid token", status: 401 });
    }
    if (route === "GET /v1/webhooks/default/secret") return send(response, 200, { key: this.secret });
    if (route === "POST /v1/files") return send(response, 201, await this.#keep(request, body));
    if ((match = /^POST \/v1\/(?:(models|deployments)\/([^/]+\/[^/]+)\/)?predictions$/.exec(route))) {
      const [, collection, name] = match;
      if (collection === "models" && name !== OFFICIAL) {
        return send(response, 404, { detail: "The requested resource could not be found.", status: 404 });
      }
      const job = this.#create(JSON.parse(body.toString()), collection === "deployments" ? { deployment: name! } : {});
      const wait = /^wait(?:=(\d+))?$/.exec(String(request.headers.prefer ?? ""));
      if (wait) await Promise.race([job.over, sleep(Number(wait[1] ?? 60) * 1000, undefined, { ref: false })]);
      return send(response, 201, job.prediction);
    }
    if ((match = /^(?:GET|POST) \/v1\/predictions\/([^/]+)(\/cancel)?$/.exec(route))) {
      const job = this.#jobs.get(match[1]!);
      if (!job) return send(response, 404, { title: "Prediction not found", status: 404 });
      if (match[2]) this.#cancel(job);
      return send(response, 200, job.prediction);
    }
    send(response, 404, { detail: "no such route" });
  }

  async #keep(request: IncomingMessage, body: Buffer): Promise<FileObject> {
    const headers = { "content-type": request.headers["content-type"]! };
    const content = (await new Response(new Uint8Array(body), { headers }).formData()).get("content");
    if (!(content instanceof File)) throw new Error("the upload has no content");
    const id = randomUUID();
    const bytes = Buffer.from(await content.arrayBuffer());
    this.#files.set(`/files/${id}`, { name: content.name, bytes, type: content.type });
    return {
      id,
      content_type: content.type,
      size: bytes.length,
      checksums: { sha256: "" },
      metadata: {},
      created_at: new Date().toISOString(),
      expires_at: null,
      urls: { get: `${this.origin}/files/${id}` },
    };
  }

  #create(
    request: Pick<Prediction, "input" | "version" | "webhook" | "webhook_events_filter">,
    target: Pick<Prediction, "deployment">,
  ): Job {
    const id = randomBytes(13).toString("hex");
    let end = (): void => undefined;
    const over = new Promise<void>((resolve) => (end = resolve));
    const prediction: Job["prediction"] = {
      id,
      model: OFFICIAL,
      version: request.version ?? "hidden",
      ...target,
      input: request.input,
      ...(request.webhook && { webhook: request.webhook }),
      ...(request.webhook_events_filter && { webhook_events_filter: request.webhook_events_filter }),
      logs: "",
      output: null,
      error: null,
      status: "starting",
      source: "api",
      data_removed: false,
      created_at: new Date().toISOString(),
      urls: {
        get: `${this.origin}/v1/predictions/${id}`,
        cancel: `${this.origin}/v1/predictions/${id}/cancel`,
      },
    };
    const job: Job = { prediction, isSent: false, canceled: Promise.resolve(), over, end, webhooks: Promise.resolve() };
    this.#jobs.set(id, job);
    this.#queue = this.#queue.then(() => this.#perform(job));
    return job;
  }

  /** Runs the prediction on the container, which accepts one at a time, and waits for its end. */
  async #perform(job: Job): Promise<void> {
    const { prediction, over } = job;
    for (;;) {
      if (prediction.status === "canceled") return;
      job.isSent = true;
      const answer = await fetch(`${this.#coglet}/predictions/${prediction.id}`, {
        method: "PUT",
        headers: { "content-type": "application/json", prefer: "respond-async" },
        body: JSON.stringify({ input: prediction.input, webhook: `${this.origin}/coglet/${prediction.id}` }),
      });
      if (answer.status === 202) return over;
      const body = await answer.text();
      // 409: the container announces the end of a prediction shortly before it is ready for the next.
      if (answer.status !== 409) return this.#update(job, { status: "failed", error: body });
      job.isSent = false;
      await sleep(50);
    }
  }

  /** Handles a webhook of the container. Webhooks after the final one are ignored: coglet's may overtake each other. */
  #update(job: Job, news: Partial<Pick<Prediction, "status" | "logs" | "output" | "error" | "metrics">>): void {
    const { prediction } = job;
    if (isOver(prediction)) return;
    const moved = (key: "logs" | "output"): boolean =>
      news[key] !== undefined && JSON.stringify(news[key]) !== JSON.stringify(prediction[key]);
    const event = isOver(news) ? "completed" : moved("output") ? "output" : moved("logs") ? "logs" : "start";
    Object.assign(prediction, news);
    if (event === "start") prediction.started_at = new Date().toISOString();
    if (event === "completed") prediction.completed_at = new Date().toISOString();
    const { webhook, webhook_events_filter: filter = ["start", "output", "logs", "completed"] } = prediction;
    if (webhook && filter.includes(event)) {
      const body = JSON.stringify(prediction);
      const status = prediction.status;
      job.webhooks = job.webhooks.then(() => this.#deliver(prediction.id, webhook, event, status, body));
    }
    if (event === "completed") job.end();
  }

  #cancel(job: Job): void {
    if (job.isSent) job.canceled = job.canceled.then(() => this.#cancelInContainer(job));
    else this.#update(job, { status: "canceled" }); // still in the queue
  }

  /** Waits for the first line of the log: coglet can lose a cancel that arrives just after the start. */
  async #cancelInContainer({ prediction }: Job): Promise<void> {
    while (!isOver(prediction) && !prediction.logs) await sleep(20);
    if (isOver(prediction)) return;
    await fetch(`${this.#coglet}/predictions/${prediction.id}/cancel`, { method: "POST" });
  }

  /** Sends a webhook. Only the final one of a prediction is retried if the response is not 2xx. */
  async #deliver(
    id: string,
    url: string,
    event: WebhookEventType,
    status: Prediction["status"],
    body: string,
  ): Promise<void> {
    const webhookId = `msg_${id}_${randomBytes(8).toString("hex")}`;
    for (let attempt = 0; attempt < (event === "completed" ? ATTEMPTS : 1); attempt++) {
      if (attempt > 0) await sleep(100 * 2 ** attempt);
      const headers = { "content-type": "application/json", ...signatureHeaders(this.secret, webhookId, body) };
      const answer = await fetch(url, { method: "POST", headers, body })
        .then(async (response) => (await response.arrayBuffer(), response.status))
        .catch(() => 0);
      this.deliveries.push({ webhookId, event, status, answer });
      if (answer >= 200 && answer < 300) return;
    }
  }
}

/** The three headers of a webhook that Replicate has signed. */
export function signatureHeaders(
  secret: string,
  id: string,
  body: string,
  timestamp = Math.floor(Date.now() / 1000),
): Record<"webhook-id" | "webhook-timestamp" | "webhook-signature", string> {
  const key = Buffer.from(secret.slice("whsec_".length), "base64");
  const signature = createHmac("sha256", key).update(`${id}.${timestamp}.${body}`).digest("base64");
  return { "webhook-id": id, "webhook-timestamp": String(timestamp), "webhook-signature": `v1,${signature}` };
}

function isOver({ status }: { status?: Prediction["status"] }): boolean {
  return status !== undefined && !["starting", "processing"].includes(status);
}

function send(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
}
