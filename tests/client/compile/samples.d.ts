/** What the samples in the documents take as given. */
declare const songUrl: string;
declare const songFile: Blob;
declare const uploadedAudioUrl: string;
declare const jobId: string;
declare const signal: AbortSignal;
declare function saveJob(predictionId: string): Promise<void>;
declare function showProgress(share: number): void;
declare function transcribe(guitarUrl: string): Promise<void>;
