// tokenizers.mjs - dlm.h's tokenizers against two of others, on random texts.
// Use: node tokenizers.mjs ENCODE FOLDER NAME FILE [NAME FILE ...]
//   ENCODE  the program made of encode.c;  FOLDER  where npm installed the packages
//   NAME    of a vocabulary, for the report
//   FILE    its tokenizer.json; or "IN > OUT": what dlm.h opens, and the tokenizer.json
//           that it saves it as, which the others then read
// The reference is the Rust library of tokenizer.json's makers (@anush008/tokenizers),
// the second opinion their JavaScript one (@huggingface/tokenizers).  A text of which
// the reference has other ids, or another decoded text, is a failure; where only the
// second differs is counted.
// Left out is what dlm.h says it does not do: normalising, telling characters that are
// not assigned from their neighbours, decoding masks; and U+2581 (a piece's space).
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import path from 'node:path';

const TEXTS = 10000, SHOWN = 8;
const [encode, folder, ...vocabularies] = process.argv.slice(2);
const require = createRequire(path.resolve(folder, 'here.js'));
const reference = require('@anush008/tokenizers').Tokenizer;
const second = require('@huggingface/tokenizers').Tokenizer;

let state = 1;                                  // mulberry32: the same texts every time
function random() {
    state = (state + 0x6D2B79F5) >>> 0;
    let x = Math.imul(state ^ state >>> 15, state | 1);
    x ^= x + Math.imul(x ^ x >>> 7, x | 61);
    return ((x ^ x >>> 14) >>> 0) / 4294967296;
}
const below = n => Math.floor(random() * n);
const pick = list => list[below(list.length)];
const between = (low, high) => () => String.fromCodePoint(low + below(high - low + 1));
const one = (...codes) => () => String.fromCodePoint(pick(codes));

// Characters by script, with the marks that compose with them.
const scripts = {
    latin: [between(0x61, 0x7A), between(0x41, 0x5A), between(0x61, 0x7A)],
    accents: [between(0x61, 0x7A), between(0xC0, 0x24F), between(0x300, 0x345),
              between(0x1E00, 0x1EFF)],
    greek: [between(0x370, 0x3FF), between(0x1F00, 0x1FFF),
            one(0x301, 0x308, 0x342, 0x345)],
    cyrillic: [between(0x400, 0x52F), one(0x306, 0x308)],
    hebrew: [between(0x5D0, 0x5EA), between(0x591, 0x5C7), between(0xFB1D, 0xFB4F)],
    arabic: [between(0x620, 0x64A), between(0x64B, 0x65F), between(0x6D0, 0x6ED)],
    indic: [between(0x900, 0x97F), between(0x980, 0x9FF), between(0xB00, 0xD7F)],
    asian: [between(0xE00, 0xEFF), between(0xF00, 0xFFF), between(0x1000, 0x109F),
            between(0x1780, 0x17FF)],
    chinese: [between(0x4E00, 0x9FFF), between(0x3000, 0x303F), between(0xF900, 0xFAFF),
              between(0x20000, 0x2A6DF), between(0x2F800, 0x2FA1D)],
    kana: [between(0x3040, 0x30FF), one(0x3099, 0x309A), between(0xFF00, 0xFFEF)],
    hangul: [between(0xAC00, 0xD7A3), between(0x1100, 0x1112), between(0x1161, 0x1175),
             between(0x11A7, 0x11C3)],
    numbers: [between(0x30, 0x39), between(0x30, 0x39), between(0x660, 0x669),
              between(0xB2, 0xB3), between(0xBC, 0xBE), between(0x2150, 0x218B),
              between(0x2460, 0x24FF), between(0x1D7CE, 0x1D7FF)],
    signs: [between(0x21, 0x2F), between(0x3A, 0x40), between(0x5B, 0x60),
            between(0x7B, 0x7E), between(0x2010, 0x205E), between(0x20A0, 0x20C0),
            between(0x2190, 0x22FF)],
    emoji: [between(0x1F300, 0x1F6FF), between(0x1F900, 0x1F9FF), one(0x200D, 0xFE0F),
            between(0x1F3FB, 0x1F3FF), between(0x1F1E6, 0x1F1FF),
            between(0x2600, 0x27BF)],
    controls: [between(0, 0x1F), between(0x7F, 0x9F),
               one(0x200B, 0x200E, 0xFEFF, 0xAD)],
};
const any = () => String.fromCodePoint(random() < 0.5 ? below(0xD800)
                                       : 0xE000 + below(0x110000 - 0xE000));
const blanks = [one(0x20), one(0x20), one(0x20), between(0x09, 0x0D), one(0x0A, 0x0D),
                one(0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0x180E),
                between(0x2000, 0x200A), between(0x1C, 0x1F)];
const words = ['the', ' of', 'Hello', ' world', "don't", "I'LL", "we've", "it's'",
               "'re", "'\u017F", ' 12345', '3.14159', 'x+=1;', '\r\n', '\n\n', '    ',
               '</s>', '<0x0A>', '<s>', 'a.b/c', 'Stra\u00DF'];

function several(makers, most) {
    let text = '';
    for (let n = 1 + below(most); n > 0; n--) text += pick(makers)();
    return text;
}
function randomText(added) {
    let text = '';
    for (let n = 1 + below(12); n > 0; n--) {
        const r = random();
        text += r < 0.45 ? several(scripts[pick(Object.keys(scripts))], 8)
            : r < 0.65 ? several(blanks, 4) : r < 0.85 ? pick(words)
            : r < 0.93 || !added.length ? several([any], 4) : pick(added);
    }
    return text.replace(/\p{Cn}/gu, '').normalize('NFC');
}

// What encode.c says of texts: [ids, the text that they decode to].
function ours(args, texts) {
    const parts = [];
    for (const text of texts) {
        const bytes = Buffer.from(text), size = Buffer.alloc(4);
        size.writeUInt32LE(bytes.length);
        parts.push(size, bytes);
    }
    const run = spawnSync(encode, args,
                          { input: Buffer.concat(parts), maxBuffer: 1 << 30 });
    if (run.status !== 0) {
        console.log(`FAIL ${args.join(' ')}: ${run.stderr || run.error}`);
        process.exit(1);
    }
    return run.stdout.toString().trimEnd().split('\n').map(line => {
        const [ids, hex] = line.split('\t');
        return [ids, Buffer.from(hex ?? '', 'hex').toString()];
    });
}

// The second insists on a part that a tokenizer.json need not have.
const whole = json => ({ post_processor: null, ...json });

let failed = 0;
async function compare(name, what) {
    const [from, to] = what.split(' > '), file = to ?? from;
    const json = () => JSON.parse(readFileSync(file));
    if (to) ours([from, to], []);
    const added = json().added_tokens.map(token => token.content);
    const texts = ['', ' ', '\n', 'a', ' a', ...added];
    while (texts.length < TEXTS) texts.push(randomText(added));
    const mine = ours(to ? [from, to] : [from], texts);
    const theirs = reference.fromFile(file), others = new second(whole(json()), {});
    let wrong = 0, decoded = 0, alone = 0;
    for (let i = 0; i < texts.length; i++) {
        const encoding = await theirs.encode(texts[i], null, { addSpecialTokens: false });
        const ids = encoding.getIds();
        const back = await theirs.decode(ids, true);
        const other = others.encode(texts[i], { add_special_tokens: false }).ids;
        if (other.join(' ') !== ids.join(' ')) alone++;
        if (mine[i][0] !== ids.join(' ')) wrong++;
        else if (mine[i][1] !== back && !/mask/i.test(texts[i])) decoded++;
        else continue;
        if (wrong + decoded > SHOWN) continue;
        console.log(`  ${JSON.stringify(texts[i])}\n    ours  ${mine[i][0]} ` +
                    `${JSON.stringify(mine[i][1])}\n    ref.  ${ids.join(' ')} ` +
                    `${JSON.stringify(back)}`);
        if (other.join(' ') === mine[i][0]) console.log('    (the second says as we do)');
    }
    console.log(`${wrong + decoded ? 'FAIL ' : ''}${name}: ${texts.length} texts, ` +
                `${wrong} with other ids, ${decoded} decoded otherwise; the second ` +
                `opinion differs from the reference in ${alone}`);
    failed += wrong + decoded;
}

for (let i = 0; i + 1 < vocabularies.length; i += 2)
    await compare(vocabularies[i], vocabularies[i + 1]);
process.exit(failed > 0 ? 1 : 0);
