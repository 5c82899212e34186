export { AbortError, PredictionError, RequestError, SeparationError, StemsError, type ErrorKind } from "./errors.js";
export type { Inputs } from "./inputs.js";
export type { Analysis, Separation, Status } from "./prediction.js";
export { Separator, type Choice, type SeparateOptions, type SeparatorOptions } from "./separator.js";
export type { StartOptions, WaitOptions } from "./service.js";
export type { Song } from "./song.js";
export { stemsByName, type SomeStemUrls, type StemName, type StemsChoice, type StemUrls, type TwoStems } from "./stems.js";
export type { Fetch } from "./transport.js";
