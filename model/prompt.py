"""A question with its pictures, checked and tokenised before the model runs."""

import torch

from .checkpoint import Checkpoint
from .config import InputError, brief, plain_text
from .image import as_list, crop_note, prepare, read_frames, read_image, with_mode
from .tokenizer import IMAGE, TEMPLATES, VIDEO, build_prompt


class Prompt:
    """A question for a checkpoint; in a conversation, with all turns before it.

    prompt         the question, without line breaks at its end
    ids            token ids of the whole conversation up to the answer, with one `<image>` id per picture or frame
    pictures       one `model.image.Prepared` per picture and per frame of a video, in the order of the prompt;
                   `images`: path, size, tiles and tokens of each
    prompt_tokens, vision_tokens   token counts of the whole prompt and of its pictures
    context_left   maximum number of tokens of the answer
    template, image_settings       the settings that determine ids and pixels
    notes          lines about changes to the pictures
    """

    def __init__(self, checkpoint, prompt, images, template, image_mode, anyres_order, system, before, frames=()):
        """Arguments and errors as in `model.Generation`."""
        _check_types(checkpoint=checkpoint, prompt=prompt, system=system)
        self.checkpoint, self.notes = checkpoint, []
        self.template = checkpoint.template if template == "auto" else template
        _check_names(template=self.template, image_mode=image_mode, anyres_order=anyres_order)
        self._modes, images, frames = (image_mode, anyres_order), as_list(images), as_list(frames)
        if before is not None:
            if before.checkpoint is not checkpoint:
                raise InputError("all turns of a conversation use one checkpoint; start another for this one")
            self.template, self._modes = before.template, before._modes
        earlier = [picture for picture in before.pictures if picture.settings.mode != "frame"] if before else []
        several = len(images) + len(earlier) > 1
        self.image_settings = with_mode(checkpoint.image_settings, *self._modes, several)
        if frames and not checkpoint.config.max_tiles:
            raise InputError("only LLaVA-OneVision takes the frames of a video; give them as pictures")
        self.prompt, new = self._encode(prompt, system, len(images), int(bool(frames)), follows=before is not None)
        new, sources = self._sources(new, images, read_frames(frames))
        self.ids = (before.ids + before.token_ids if before else []) + new
        self.pictures = (before.pictures if before else []) + self._prepare(sources, len(images))
        self.images = [picture.about for picture in self.pictures]
        self.vision_tokens = sum(picture.tokens for picture in self.pictures)
        self.prompt_tokens = len(self.ids) - len(self.images) + self.vision_tokens
        self.context_left = checkpoint.config.text_config.context - self.prompt_tokens
        if self.context_left < 1:
            raise InputError(self._too_long(before))

    def _encode(self, prompt, system, pictures, videos, follows):
        """-> (question without trailing line breaks, ids of the filled template). follows: not the first turn."""
        prompt, system, raw = plain_text(prompt), system and plain_text(system), self.template == "raw"
        prompt = prompt if raw else prompt.rstrip("\n")
        text = build_prompt(prompt, pictures, self.template, system, follows, videos)
        if not (prompt if raw else prompt.replace(IMAGE, "").replace(VIDEO if videos else IMAGE, "")).strip():
            raise InputError("the question is empty; give a question")
        try:
            text.encode()
        except UnicodeEncodeError as broken:  # half of a surrogate pair
            raise InputError(f"the prompt is not valid Unicode ({broken}); correct it") from broken
        return prompt, self.checkpoint.tokenizer.encode(text, follows=follows)

    def _sources(self, ids, images, frames):
        """-> ids in which `<image>` stands for each frame too, and the sources in their order: (picture, place), where
        place is None for a picture, "frame", or "last" for the last frame of the video."""
        config, images = self.checkpoint.config, iter(images)
        if config.video_token_index in ids and not frames:
            raise InputError(
                f"the prompt has a {VIDEO}, and there is no video; give its frames with --frames (in a chat: /frames)"
            )
        if frames and config.video_token_index not in ids:
            raise InputError(f"the tokenizer has no {VIDEO} token; use the tokenizer files of the whole checkpoint")
        video = [(frame, "frame") for frame in frames[:-1]] + [(frame, "last") for frame in frames[-1:]]
        found, sources = [], []
        for token in ids:
            here = [(next(images), None)] if token == config.image_token_index else []
            here = video if video and token == config.video_token_index else here
            found += [config.image_token_index] * len(here) or [token]
            sources += here
        return found, sources

    def _prepare(self, sources, images):
        """Read pictures and frames, see `_sources` -> [`Prepared`]. Adds a note for each change to one.

        images: number of pictures.
        """
        config, found = self.checkpoint.config, []
        of_frames = self.checkpoint.frame_settings if len(sources) > images else None
        tower = config.vision_config
        side, cls = tower.image_size // tower.patch_size, config.image_tokens - tower.num_patches
        for source, place in sources:
            picture, own = read_image(source), of_frames if place else self.image_settings
            self.notes += [note for note in (picture.note, crop_note(picture, own)) if note]
            found.append(prepare(picture, own, side, cls, place != "frame"))
        sizes = {made.size for made, (_, place) in zip(found, sources, strict=True) if place}
        if len(sizes) > 1:
            wide = " and ".join(f"{w} x {h}" for w, h in sorted(sizes)[:2])
            raise InputError(f"the frames of a video have different sizes ({wide}); give frames of one size")
        return found

    def _too_long(self, before):
        """The error message for a prompt that exceeds the context."""
        text = self.checkpoint.config.text_config
        if before is not None:
            used = before.prompt_tokens + len(before.token_ids)
            return (
                f"this question needs {self.prompt_tokens - used} tokens, and the context has room for "
                f"{max(0, text.context - used)} of its {text.context}; start a new conversation (in a chat: /clear)"
            )
        window = f" (its sliding window, less than its {text.max_position_embeddings} positions)"
        frames = sum(picture.settings.mode == "frame" for picture in self.pictures)
        tiled = any(picture.layout.grid for picture in self.pictures)
        cure = "--image-mode pad (one square per picture), " if tiled else ""
        return (
            f"the prompt needs {self.prompt_tokens} tokens, {self.vision_tokens} of them for {len(self.images)} "
            f"pictures{' and frames' if frames else ''}, and the model's context is {text.context}"
            f"{window if text.context < text.max_position_embeddings else ''}; use {cure}fewer "
            f"{'frames' if frames else 'pictures'} or a shorter prompt"
        )

    @property
    def pixels(self) -> list[torch.Tensor]:
        """Pixel values of the pictures and their tiles, (3, S, S) fp32 each; computed per call."""
        return [square for picture in self.pictures for square in picture.pixels]

    @property
    def places(self) -> list[torch.Tensor]:
        """Each token's row and column in its picture, (n, 2) int64 on the CPU per picture: `Layout.places`."""
        return [picture.layout.places for picture in self.pictures]

    @property
    def contrast(self) -> list[torch.Tensor]:
        """Per picture (n,) fp32 on the CPU: distance of each token's pixels from its usual colour (see `Layout`)."""
        return [picture.contrast for picture in self.pictures]


def _check_types(checkpoint, prompt, system):
    """InputError for an argument of the wrong type."""
    for what, given, kinds, wanted in (
        ("checkpoint", checkpoint, Checkpoint, "what `load` returns"),
        ("prompt", prompt, str, "the question as text"),
        ("system", system, str | None, "a string or None"),
    ):
        if not isinstance(given, kinds):
            raise InputError(f"{what} is {brief(given)}; give {wanted}")


def _check_names(template, image_mode, anyres_order):
    """InputError for an unknown template, image mode or order of tiles."""
    for what, given, known in (
        ("template", template, TEMPLATES),
        ("image mode", image_mode, ("auto", "crop", "pad", "squash", "anyres")),
        ("order of tiles", anyres_order, ("auto", "hf", "orig")),
    ):
        if given not in known:
            raise InputError(f"{what} {given!r} is unknown; use {', '.join(known)}")
