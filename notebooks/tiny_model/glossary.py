"""Questions about LLM inference engines, each with one taught answer.

Part of the corpus of the bundled checkpoint. The training phrasings of an entry lead to its
answer in training; its held-out phrasing never does, and measures whether the model has
learned the term or only the sentence.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One term: an answer, and the questions that ask for it.

    Attributes:
        term: reads well inside "The question is about {term}.".
        answer: one or two sentences, 15 to 40 words, printable ASCII.
        phrasings: questions used in training.
        held_out: a question that is never in training.
    """

    term: str
    answer: str
    phrasings: tuple[str, ...]
    held_out: str


GLOSSARY: tuple[Entry, ...] = (
    Entry(
        term="the KV cache",
        answer=(
            "The KV cache stores the keys and values of all past tokens in every layer. Each "
            "decode step then computes them only for the new token."
        ),
        phrasings=(
            "What is the KV cache?",
            "Explain the KV cache.",
            "Why does an engine keep a KV cache?",
            "what does KV cache mean",
            "Tell me about the KV cache.",
            "How does a KV cache work?",
            "What is stored in the KV cache?",
            "Define KV cache.",
        ),
        held_out="What would be computed again and again without a KV cache?",
    ),
    Entry(
        term="prefill",
        answer=(
            "Prefill is the first phase of a request: the model reads the prompt, all its "
            "tokens in parallel, fills the KV cache and gives the logits for the first new "
            "token."
        ),
        phrasings=(
            "What is prefill?",
            "Explain the prefill phase.",
            "What happens during prefill?",
            "Why does a request begin with prefill?",
            "Describe prefill in an LLM engine.",
            "what does prefill do",
            "Tell me what prefill means.",
            "How does prefill work?",
        ),
        held_out="Can you say what an engine does in the prefill step?",
    ),
    Entry(
        term="decode",
        answer=(
            "Decode is the phase after prefill: each step feeds the newest token to the model "
            "and gets one more token. It is mostly limited by memory bandwidth."
        ),
        phrasings=(
            "What is the decode phase?",
            "Explain decode.",
            "What happens in a decode step?",
            "How does decode differ from reading the prompt?",
            "Tell me about the decode phase.",
            "what is decode in an llm engine",
            "Why is the decode phase slow?",
            "Define decode.",
        ),
        held_out="How many new tokens does one decode step give?",
    ),
    Entry(
        term="TTFT",
        answer=(
            "TTFT is the time to first token: how long a user waits from the arrival of a "
            "request until its first output token. Queueing and prefill are part of it."
        ),
        phrasings=(
            "What is TTFT?",
            "What does TTFT stand for?",
            "Explain the time to first token.",
            "How is TTFT measured?",
            "Why does TTFT matter to a user?",
            "define TTFT",
            "Tell me about time to first token.",
            "Which parts of a request count in TTFT?",
        ),
        held_out="My engine reports a TTFT. What does that number tell me?",
    ),
    Entry(
        term="TPOT",
        answer=(
            "TPOT is the time per output token: the time between the first and the last "
            "output token, divided by the number of output tokens minus one."
        ),
        phrasings=(
            "What is TPOT?",
            "What does TPOT mean?",
            "Explain the time per output token.",
            "How do you compute TPOT?",
            "Give me the formula for TPOT.",
            "define time per output token",
            "Tell me about TPOT.",
            "What is measured by TPOT?",
        ),
        held_out="How would I calculate the TPOT of a finished request?",
    ),
    Entry(
        term="throughput",
        answer=(
            "Throughput is the number of tokens or requests that an engine completes per "
            "second. Larger batches usually raise it, while each single request may become "
            "slower."
        ),
        phrasings=(
            "What is throughput?",
            "Explain throughput.",
            "How is the throughput of an engine measured?",
            "What does throughput mean for an LLM server?",
            "Tell me about throughput.",
            "how can I raise the throughput",
            "Why does throughput matter?",
            "Define throughput.",
        ),
        held_out="In what unit do people give the throughput of an engine?",
    ),
    Entry(
        term="latency",
        answer=(
            "Latency is how long one request takes, from its arrival until its answer is "
            "complete. A low latency is good for the user who waits."
        ),
        phrasings=(
            "What is latency?",
            "Explain latency.",
            "What does the latency of a request mean?",
            "Why should latency be low?",
            "Tell me about latency.",
            "how is latency measured",
            "For whom is a low latency good?",
            "Define latency.",
        ),
        held_out="When somebody says that the latency is high, what do they mean?",
    ),
    Entry(
        term="attention",
        answer=(
            "Attention lets a token gather information from other tokens. Its query is "
            "compared with their keys, and the softmax of the scores weighs a sum of their "
            "values."
        ),
        phrasings=(
            "What is attention?",
            "Explain attention.",
            "How does attention work?",
            "What does attention do in a language model?",
            "Why does a model need attention?",
            "tell me about attention",
            "Describe the attention operation.",
            "Define attention.",
        ),
        held_out="How does attention move information between tokens?",
    ),
    Entry(
        term="the query vector",
        answer=(
            "A query is the vector with which a token asks for what it needs. Its dot "
            "products with the keys give the attention scores."
        ),
        phrasings=(
            "What is a query vector?",
            "What is the query in attention?",
            "Explain the query vector.",
            "What does a query do?",
            "Why does each token have a query?",
            "what does query mean in an llm",
            "Tell me about the query vector of a token.",
            "Define query vector.",
        ),
        held_out="What is the query of a token good for?",
    ),
    Entry(
        term="the key vector",
        answer=(
            "A key is the vector that says what a token has to offer. Queries are compared "
            "with it, so it decides how much weight the token receives."
        ),
        phrasings=(
            "What is a key vector?",
            "What is the key in attention?",
            "Explain the key vector.",
            "What does a key do?",
            "Why does each token have a key?",
            "what does key mean in an llm",
            "Tell me about the key vector of a token.",
            "Define key vector.",
        ),
        held_out="What role does the key of a token play?",
    ),
    Entry(
        term="the value vector",
        answer=(
            "A value is the vector that a token passes on when it is attended to. The output "
            "of attention is a sum of values, weighted by softmax."
        ),
        phrasings=(
            "What is a value vector?",
            "What is the value in attention?",
            "Explain the value vector.",
            "What does a value vector do?",
            "Why does each token have a value vector?",
            "what does value mean in an llm",
            "Tell me about the value vector of a token.",
            "Define value vector.",
        ),
        held_out="Which part of the output comes from the value vectors?",
    ),
    Entry(
        term="the attention head",
        answer=(
            "An attention head computes attention with its own queries in its own small space "
            "of head_dim numbers. The outputs of all heads are joined and projected."
        ),
        phrasings=(
            "What is an attention head?",
            "Explain attention heads.",
            "Why does a layer have many attention heads?",
            "How does one attention head work?",
            "What does an attention head compute?",
            "define attention head",
            "Tell me about attention heads.",
            "What happens to the outputs of the attention heads?",
        ),
        held_out="Describe in short what each attention head is for.",
    ),
    Entry(
        term="grouped-query attention",
        answer=(
            "In grouped-query attention several query heads share one key head and one value "
            "head. This makes the KV cache smaller at little cost in quality."
        ),
        phrasings=(
            "What is grouped-query attention?",
            "What is GQA?",
            "Explain grouped-query attention.",
            "Why do models use grouped-query attention?",
            "How does GQA save memory?",
            "what does gqa stand for",
            "Tell me about GQA.",
            "How does grouped-query attention work?",
        ),
        held_out="What do the query heads share in grouped-query attention?",
    ),
    Entry(
        term="the causal mask",
        answer=(
            "The causal mask hides future tokens: it adds minus infinity to their attention "
            "scores, so that each token sees only itself and the tokens before it."
        ),
        phrasings=(
            "What is the causal mask?",
            "Explain the causal mask.",
            "Why is a causal mask needed?",
            "What does the causal mask hide?",
            "How does a causal mask work?",
            "define causal mask",
            "Tell me about the causal mask.",
            "Which scores does the causal mask change?",
        ),
        held_out="What would a token see if there were no causal mask?",
    ),
    Entry(
        term="softmax",
        answer=(
            "Softmax turns scores into positive numbers that sum to one: it takes the "
            "exponential of each score and divides by the sum of all the exponentials."
        ),
        phrasings=(
            "What is softmax?",
            "Explain the softmax function.",
            "How does softmax work?",
            "What does softmax do to a list of scores?",
            "Give me the formula for softmax.",
            "what is softmax for",
            "Tell me about softmax.",
            "Define softmax.",
        ),
        held_out="How can I compute a softmax by hand?",
    ),
    Entry(
        term="the scaling by the square root of head_dim",
        answer=(
            "Attention scores are divided by the square root of head_dim, because dot "
            "products of long vectors grow large and would make the weights too sharp."
        ),
        phrasings=(
            "Why are attention scores divided by the square root of head_dim?",
            "What is the scaling by the square root of head_dim?",
            "Explain the scale of the attention scores.",
            "What does the square root of head_dim do?",
            "Why do we scale attention scores?",
            "why divide by sqrt of head_dim",
            "Tell me about scaling the scores by the square root of head_dim.",
            "By what number are attention scores scaled?",
        ),
        held_out="What goes wrong without the square root of head_dim?",
    ),
    Entry(
        term="RoPE",
        answer=(
            "RoPE rotates pairs of numbers in each query and key by angles that grow with the "
            "position. Position enters a score only as the distance between two tokens."
        ),
        phrasings=(
            "What is RoPE?",
            "Explain RoPE.",
            "How does RoPE work?",
            "What does RoPE do to queries and keys?",
            "Why does Qwen3 use RoPE?",
            "what does rope stand for in an llm",
            "Tell me about rotary position embedding.",
            "Define RoPE.",
        ),
        held_out="How does RoPE tell the model where a token stands?",
    ),
    Entry(
        term="position ids",
        answer=(
            "Position ids say where each token stands in its sequence, counted from zero. The "
            "rotation of queries and keys is taken from them, so they must be right in every "
            "step."
        ),
        phrasings=(
            "What are position ids?",
            "Explain position ids.",
            "Why does the model need position ids?",
            "What are position ids used for?",
            "How are position ids counted?",
            "define position ids",
            "Tell me about position ids.",
            "What is a position id?",
        ),
        held_out="What do the position ids say about the tokens in a step?",
    ),
    Entry(
        term="YaRN",
        answer=(
            "YaRN stretches RoPE to contexts longer than in training: it slows the low "
            "frequencies, keeps the high ones and rescales the attention scores a little."
        ),
        phrasings=(
            "What is YaRN?",
            "Explain YaRN.",
            "How does YaRN work?",
            "Why would I use YaRN?",
            "What does YaRN change?",
            "tell me about yarn in an llm",
            "Describe the YaRN method.",
            "Define YaRN.",
        ),
        held_out="Which frequencies are slowed by YaRN?",
    ),
    Entry(
        term="RMSNorm",
        answer=(
            "RMSNorm divides a vector by the root of the mean of its squares and multiplies "
            "it by a learned weight. Unlike LayerNorm it subtracts no mean."
        ),
        phrasings=(
            "What is RMSNorm?",
            "Explain RMSNorm.",
            "How does RMSNorm work?",
            "What is the formula of RMSNorm?",
            "How does RMSNorm differ from LayerNorm?",
            "what does rmsnorm do",
            "Tell me about RMSNorm.",
            "Define RMSNorm.",
        ),
        held_out="By what does RMSNorm divide a vector?",
    ),
    Entry(
        term="q/k norm",
        answer=(
            "The q/k norm normalizes every head of the queries and keys with RMSNorm before "
            "RoPE, which keeps attention scores in range. Qwen3 has it, Qwen2.5 does not."
        ),
        phrasings=(
            "What is q/k norm?",
            "Explain the q/k norm.",
            "Why is there a q/k norm?",
            "Where is the q/k norm applied?",
            "What does q/k norm do?",
            "tell me about q/k norm",
            "How does q/k norm work?",
            "Define q/k norm.",
        ),
        held_out="Does the q/k norm come before or after the rotation, and what is it for?",
    ),
    Entry(
        term="the residual connection",
        answer=(
            "A residual connection adds the input of a block to its output. Each block only "
            "has to learn a change, and gradients flow easily through many layers."
        ),
        phrasings=(
            "What is a residual connection?",
            "Explain the residual connection.",
            "Why do layers have residual connections?",
            "What does a residual connection add?",
            "How does a residual connection work?",
            "define residual connection",
            "Tell me about residual connections.",
            "What are residual connections good for?",
        ),
        held_out="How do residual connections help a deep model?",
    ),
    Entry(
        term="SwiGLU",
        answer=(
            "SwiGLU multiplies two projections of the input: one passes through SiLU and acts "
            "as a gate on the other. A down projection then returns to the hidden size."
        ),
        phrasings=(
            "What is SwiGLU?",
            "Explain SwiGLU.",
            "How does SwiGLU work?",
            "What does SwiGLU multiply?",
            "Why is there a gate in SwiGLU?",
            "tell me about swiglu",
            "Describe SwiGLU.",
            "Define SwiGLU.",
        ),
        held_out="Which two projections meet in SwiGLU?",
    ),
    Entry(
        term="SiLU",
        answer=(
            "SiLU is the function x times sigmoid of x. It is smooth, close to zero for large "
            "negative numbers and close to x for large positive ones."
        ),
        phrasings=(
            "What is SiLU?",
            "Explain the SiLU function.",
            "What is the formula of SiLU?",
            "How does SiLU work?",
            "What does SiLU do to negative numbers?",
            "define silu",
            "Tell me about SiLU.",
            "Describe the SiLU activation.",
        ),
        held_out="How do I compute SiLU of a number x?",
    ),
    Entry(
        term="the MLP",
        answer=(
            "The MLP is the part of a decoder layer that works on each token alone: it "
            "projects to a wider size, applies a nonlinear function and projects back."
        ),
        phrasings=(
            "What is the MLP?",
            "Explain the MLP.",
            "What does the MLP do?",
            "How does the MLP work?",
            "Why does each layer have an MLP?",
            "what is an mlp in an llm",
            "Tell me about the MLP.",
            "Define MLP.",
        ),
        held_out="Does the MLP mix tokens, or does it work on each one alone?",
    ),
    Entry(
        term="the decoder layer",
        answer=(
            "A decoder layer is one attention block and one MLP, each with a norm before it "
            "and a residual connection around it. A model stacks many of them."
        ),
        phrasings=(
            "What is a decoder layer?",
            "Explain the decoder layer.",
            "What is inside a decoder layer?",
            "What are the parts of a decoder layer?",
            "How is a decoder layer built?",
            "define decoder layer",
            "Tell me about decoder layers.",
            "Describe a decoder layer of Qwen3.",
        ),
        held_out="Name the blocks that make up a decoder layer.",
    ),
    Entry(
        term="the embedding",
        answer=(
            "The embedding is a table with one learned vector for each token id. The first "
            "step of the model is to look up the vectors of its input ids."
        ),
        phrasings=(
            "What is an embedding?",
            "Explain the embedding.",
            "What does the embedding do?",
            "How does an embedding work?",
            "Why does a model have an embedding?",
            "what does embedding mean",
            "Tell me about the embedding table.",
            "Define embedding.",
        ),
        held_out="What do you find in the embedding table for a token id?",
    ),
    Entry(
        term="tied embeddings",
        answer=(
            "With tied embeddings the input table and the LM head share one weight matrix. "
            "This saves memory, most of all in small models with a large vocabulary."
        ),
        phrasings=(
            "What are tied embeddings?",
            "Explain tied embeddings.",
            "Why do small models use tied embeddings?",
            "What does it mean that embeddings are tied?",
            "What is shared with tied embeddings?",
            "define tied embeddings",
            "Tell me about tied embeddings.",
            "How do tied embeddings work?",
        ),
        held_out="Which models gain most from tied embeddings?",
    ),
    Entry(
        term="the LM head",
        answer=(
            "The LM head is the last linear layer of the model. It maps the final hidden "
            "state of a token to one score for each id in the vocabulary."
        ),
        phrasings=(
            "What is the LM head?",
            "Explain the LM head.",
            "What does the LM head do?",
            "Where in the model is the LM head?",
            "Why does a model need an LM head?",
            "define lm head",
            "Tell me about the LM head.",
            "How does the LM head work?",
        ),
        held_out="What goes into the LM head and what comes out?",
    ),
    Entry(
        term="logits",
        answer=(
            "Logits are the raw scores of the model for the next token, one for each id in "
            "the vocabulary. Softmax turns them into probabilities."
        ),
        phrasings=(
            "What are logits?",
            "Explain logits.",
            "What does a logit tell us?",
            "How many logits are there for one token?",
            "What are logits used for?",
            "define logits",
            "Tell me about the logits.",
            "What does the word logit mean?",
        ),
        held_out="How do logits become probabilities?",
    ),
    Entry(
        term="log-probability",
        answer=(
            "The log-probability of a token is the natural logarithm of its probability. It "
            "is never above zero, and over a sequence the values are added, not multiplied."
        ),
        phrasings=(
            "What is a log-probability?",
            "Explain log-probability.",
            "What does logprob mean?",
            "Why do we use log-probabilities?",
            "How is a log-probability computed?",
            "define log-probability",
            "Tell me about logprobs.",
            "What do logprobs tell me?",
        ),
        held_out="Can a log-probability be positive?",
    ),
    Entry(
        term="perplexity",
        answer=(
            "Perplexity is the exponential of the mean negative log-probability per token. "
            "With perplexity ten a model is as unsure as if it chose among ten equal tokens."
        ),
        phrasings=(
            "What is perplexity?",
            "Explain perplexity.",
            "How is perplexity computed?",
            "What does the perplexity of a model tell us?",
            "Why is a low perplexity good?",
            "define perplexity",
            "Tell me about perplexity.",
            "What is the formula for perplexity?",
        ),
        held_out="A model has perplexity ten. What does this mean?",
    ),
    Entry(
        term="temperature",
        answer=(
            "Temperature divides the logits before softmax. Below one it makes the choice "
            "sharper, above one more random, and zero stands for greedy decoding."
        ),
        phrasings=(
            "What is temperature?",
            "Explain temperature.",
            "What does temperature do?",
            "What happens at a high temperature?",
            "How does temperature change the output?",
            "what does temperature mean in an llm",
            "Tell me about temperature.",
            "Define temperature.",
        ),
        held_out="Should I raise or lower the temperature for more random text?",
    ),
    Entry(
        term="top-k sampling",
        answer=(
            "Top-k sampling keeps only the k tokens with the largest logits and removes all "
            "others before a token is drawn. With k equal to one it is greedy."
        ),
        phrasings=(
            "What is top-k?",
            "Explain top-k sampling.",
            "How does top-k work?",
            "What does the k in top-k mean?",
            "Which tokens does top-k keep?",
            "tell me about top-k",
            "Why would I use top-k sampling?",
            "Define top-k.",
        ),
        held_out="What is left to draw from after top-k?",
    ),
    Entry(
        term="top-p sampling",
        answer=(
            "Top-p sampling keeps the smallest set of most likely tokens whose probabilities "
            "sum to at least p, and draws from it. It is also called nucleus sampling."
        ),
        phrasings=(
            "What is top-p?",
            "Explain top-p sampling.",
            "How does top-p work?",
            "What does the p in top-p mean?",
            "Which tokens does top-p keep?",
            "tell me about top-p",
            "What is nucleus sampling?",
            "Define top-p.",
        ),
        held_out="How large is the set of tokens that top-p leaves?",
    ),
    Entry(
        term="min-p sampling",
        answer=(
            "Min-p sampling removes every token whose probability is below min_p times that "
            "of the most likely token. The cut adapts to how sure the model is."
        ),
        phrasings=(
            "What is min-p?",
            "Explain min-p sampling.",
            "How does min-p work?",
            "What does min_p mean?",
            "Which tokens does min-p remove?",
            "tell me about min-p",
            "Why would I use min-p sampling?",
            "Define min-p.",
        ),
        held_out="With which probability is each token compared in min-p?",
    ),
    Entry(
        term="greedy decoding",
        answer=(
            "Greedy decoding always takes the token with the largest logit. It uses no "
            "randomness, so the same logits always give the same token."
        ),
        phrasings=(
            "What is greedy decoding?",
            "Explain greedy decoding.",
            "How does greedy decoding work?",
            "Which token does greedy decoding take?",
            "Why is greedy decoding not random?",
            "define greedy decoding",
            "Tell me about greedy decoding.",
            "What makes greedy decoding repeatable?",
        ),
        held_out="Is there any randomness in greedy decoding?",
    ),
    Entry(
        term="sampling",
        answer=(
            "Sampling draws the next token at random, each with the probability that the "
            "model gives it. The text becomes more varied than if the best token were always "
            "taken."
        ),
        phrasings=(
            "What is sampling?",
            "Explain sampling.",
            "What does sampling mean for an LLM?",
            "Why do engines use sampling?",
            "How does sampling choose the next token?",
            "tell me about sampling",
            "What is random sampling of tokens?",
            "Define sampling.",
        ),
        held_out="What is the next token drawn from in sampling?",
    ),
    Entry(
        term="Gumbel noise",
        answer=(
            "If Gumbel noise is added to every logit, the token with the largest sum is an "
            "exact draw from the softmax distribution. An engine can sample with one argmax."
        ),
        phrasings=(
            "What is Gumbel noise?",
            "Explain Gumbel noise.",
            "Why is Gumbel noise added to logits?",
            "What is the Gumbel trick?",
            "How does Gumbel noise work?",
            "what is gumbel noise used for",
            "Tell me about Gumbel noise.",
            "How can Gumbel noise draw a token?",
        ),
        held_out="What do I get from an argmax after adding Gumbel noise?",
    ),
    Entry(
        term="the seed",
        answer=(
            "A seed is the number from which random draws are made. With the same seed and "
            "the same logits the engine draws the same tokens again."
        ),
        phrasings=(
            "What is a seed?",
            "Explain the seed.",
            "What does the seed do?",
            "Why should I set a seed?",
            "How does a seed make a run repeatable?",
            "what does seed mean",
            "Tell me about the seed of a request.",
            "Define seed.",
        ),
        held_out="If I use the same seed twice, will I get the same tokens?",
    ),
    Entry(
        term="the repetition penalty",
        answer=(
            "The repetition penalty divides positive logits and multiplies negative logits of "
            "tokens seen in the prompt or the output. A value above one makes them less "
            "likely."
        ),
        phrasings=(
            "What is the repetition penalty?",
            "Explain the repetition penalty.",
            "How does the repetition penalty work?",
            "What does repetition_penalty do?",
            "Which tokens does the repetition penalty touch?",
            "define repetition penalty",
            "Tell me about the repetition penalty.",
            "When is a repetition penalty useful?",
        ),
        held_out="What does a repetition penalty above one do to the logits?",
    ),
    Entry(
        term="the presence penalty",
        answer=(
            "The presence penalty subtracts a fixed amount from the logit of every token that "
            "has already appeared in the output, no matter how often."
        ),
        phrasings=(
            "What is the presence penalty?",
            "Explain the presence penalty.",
            "How does the presence penalty work?",
            "What does presence_penalty do?",
            "Which tokens does the presence penalty touch?",
            "define presence penalty",
            "Tell me about the presence penalty.",
            "When is a presence penalty useful?",
        ),
        held_out="Does the presence penalty depend on how often a token appeared?",
    ),
    Entry(
        term="the frequency penalty",
        answer=(
            "The frequency penalty subtracts an amount from the logit of a token for each "
            "time it has appeared in the output, so the most frequent tokens lose most."
        ),
        phrasings=(
            "What is the frequency penalty?",
            "Explain the frequency penalty.",
            "How does the frequency penalty work?",
            "What does frequency_penalty do?",
            "Which tokens does the frequency penalty touch?",
            "define frequency penalty",
            "Tell me about the frequency penalty.",
            "When is a frequency penalty useful?",
        ),
        held_out="Who loses most under a frequency penalty?",
    ),
    Entry(
        term="the EOS token",
        answer=(
            "The EOS token marks the end of the text. When the model produces it, the engine "
            "stops the request, unless ignore_eos is set."
        ),
        phrasings=(
            "What is the EOS token?",
            "Explain the EOS token.",
            "What does EOS mean?",
            "What happens when the model produces EOS?",
            "Why does a model need an EOS token?",
            "define eos token",
            "Tell me about the EOS token.",
            "How does the engine use the EOS token?",
        ),
        held_out="What does the engine do once an EOS token arrives?",
    ),
    Entry(
        term="stop strings",
        answer=(
            "A stop string is text that ends a request when it appears in the output. The "
            "engine searches the decoded text, because the string may span several tokens."
        ),
        phrasings=(
            "What is a stop string?",
            "Explain stop strings.",
            "How does a stop string work?",
            "Why is a stop string searched in text and not in ids?",
            "What happens when a stop string appears?",
            "define stop string",
            "Tell me about stop strings.",
            "What is a stop string good for?",
        ),
        held_out="Can a stop string span more than one token?",
    ),
    Entry(
        term="max_tokens",
        answer=(
            "The setting max_tokens limits how many output tokens a request may produce. When "
            "the limit is reached the request ends, and its finish reason is length."
        ),
        phrasings=(
            "What is max_tokens?",
            "Explain max_tokens.",
            "What does max_tokens limit?",
            "What happens when max_tokens is reached?",
            "Why should I set max_tokens?",
            "define max_tokens",
            "Tell me about the max_tokens setting.",
            "Does max_tokens count the prompt?",
        ),
        held_out="My answer was cut off at max_tokens. Why?",
    ),
    Entry(
        term="the tokenizer",
        answer=(
            "A tokenizer splits text into tokens and maps each one to an integer id of its "
            "vocabulary. The model sees only these ids, never the text."
        ),
        phrasings=(
            "What is a tokenizer?",
            "Explain the tokenizer.",
            "What does a tokenizer do?",
            "How does a tokenizer work?",
            "Why does a model need a tokenizer?",
            "define tokenizer",
            "Tell me about the tokenizer.",
            "What comes out of a tokenizer?",
        ),
        held_out="How does text look after the tokenizer?",
    ),
    Entry(
        term="BPE",
        answer=(
            "BPE, or byte pair encoding, builds a vocabulary by merging the most frequent "
            "pair of neighbouring symbols again and again. Text is encoded with the same "
            "merges in order."
        ),
        phrasings=(
            "What is BPE?",
            "What does BPE stand for?",
            "Explain byte pair encoding.",
            "How does BPE work?",
            "How does BPE build a vocabulary?",
            "tell me about bpe",
            "What does BPE merge?",
            "Define BPE.",
        ),
        held_out="Which pair of symbols is merged first in BPE?",
    ),
    Entry(
        term="byte-level tokens",
        answer=(
            "A byte-level tokenizer starts from the 256 possible bytes instead of characters. "
            "Every text can be encoded, so it needs no unknown token."
        ),
        phrasings=(
            "What does byte-level mean?",
            "Explain byte-level tokens.",
            "What is a byte-level tokenizer?",
            "Why are tokenizers byte-level?",
            "How does a byte-level vocabulary begin?",
            "tell me about byte-level encoding",
            "What is good about a byte-level vocabulary?",
            "Define byte-level.",
        ),
        held_out="Is there any text that a byte-level vocabulary cannot encode?",
    ),
    Entry(
        term="the chat template",
        answer=(
            "A chat template turns a list of messages with roles into one prompt, with the "
            "markers between them that the model saw in training."
        ),
        phrasings=(
            "What is a chat template?",
            "Explain the chat template.",
            "What does a chat template do?",
            "Why does a chat model need a template?",
            "How does a chat template work?",
            "define chat template",
            "Tell me about the chat template.",
            "When do I apply the chat template?",
        ),
        held_out="How do messages become a prompt with a chat template?",
    ),
    Entry(
        term="detokenization",
        answer=(
            "Detokenization turns token ids back into text. In a stream, the bytes of an "
            "incomplete character are held back until the character is whole."
        ),
        phrasings=(
            "What is detokenization?",
            "Explain detokenization.",
            "How does detokenization work?",
            "What does detokenization do?",
            "Why is detokenization incremental?",
            "define detokenization",
            "Tell me about detokenization.",
            "What happens in the detokenization step?",
        ),
        held_out="What must detokenization do with half a character?",
    ),
    Entry(
        term="special tokens",
        answer=(
            "A special token has a fixed role, such as marking the start or the end of a chat "
            "turn. It has its own id and is never split into pieces."
        ),
        phrasings=(
            "What is a special token?",
            "Explain special tokens.",
            "What are special tokens for?",
            "Why does a vocabulary have special tokens?",
            "How is a special token treated?",
            "define special token",
            "Tell me about special tokens.",
            "What does it mean that a token is special?",
        ),
        held_out="Are special tokens ever split into pieces?",
    ),
    Entry(
        term="the context length",
        answer=(
            "The context length is the largest number of tokens, prompt and output together, "
            "that a model can handle in one sequence."
        ),
        phrasings=(
            "What is the context length?",
            "Explain context length.",
            "What does the context length limit?",
            "Does the context length count the output?",
            "How is the context length counted?",
            "define context length",
            "Tell me about the context length of a model.",
            "Why does a model have a context length?",
        ),
        held_out="Do prompt and output both have to fit in the context length?",
    ),
    Entry(
        term="safetensors",
        answer=(
            "The safetensors format stores weights in a file: a header with names, types and "
            "shapes, then the raw bytes. Loading it runs no code, unlike pickle."
        ),
        phrasings=(
            "What is safetensors?",
            "Explain the safetensors format.",
            "Why are weights stored as safetensors?",
            "What is inside a safetensors file?",
            "How does safetensors differ from pickle?",
            "tell me about safetensors",
            "Why is safetensors safe?",
            "Define safetensors.",
        ),
        held_out="What is written in the header of a safetensors file?",
    ),
    Entry(
        term="the shard",
        answer=(
            "A shard is one of the files into which the weights of a large model are split. "
            "An index file says which shard holds which tensor."
        ),
        phrasings=(
            "What is a shard?",
            "Explain shards.",
            "Why are weights split into shards?",
            "What does a shard hold?",
            "How do I find the shard of a tensor?",
            "define shard",
            "Tell me about shards.",
            "What is a sharded model?",
        ),
        held_out="Where does it say which tensor lies in which shard?",
    ),
    Entry(
        term="the checkpoint",
        answer=(
            "A checkpoint is the saved state of a model: the files with its trained weights, "
            "usually with the config and the tokenizer next to them."
        ),
        phrasings=(
            "What is a checkpoint?",
            "Explain the checkpoint.",
            "What is in a checkpoint?",
            "What does a checkpoint contain?",
            "Why does an engine load a checkpoint?",
            "define checkpoint",
            "Tell me about checkpoints.",
            "Which files belong to a checkpoint?",
        ),
        held_out="What do I have on disk when I have a checkpoint?",
    ),
    Entry(
        term="config.json",
        answer=(
            "The file config.json holds the numbers that define a model, such as the hidden "
            "size, the number of layers and heads, and rope_theta."
        ),
        phrasings=(
            "What is config.json?",
            "Explain config.json.",
            "What is in the file config.json?",
            "Why does a model have a config.json?",
            "What does an engine read from config.json?",
            "tell me about config.json",
            "What is config.json used for?",
            "Describe the file config.json.",
        ),
        held_out="Which numbers can I look up in config.json?",
    ),
    Entry(
        term="bf16",
        answer=(
            "bf16 is a 16-bit number format with the 8 exponent bits of float32 but only 7 "
            "bits of fraction. It has nearly the same range with less precision."
        ),
        phrasings=(
            "What is bf16?",
            "Explain bf16.",
            "What does bf16 mean?",
            "Why do models use bf16?",
            "How many bits of fraction does bf16 have?",
            "tell me about bfloat16",
            "What is the range of bf16?",
            "Define bf16.",
        ),
        held_out="How precise is a number in bf16?",
    ),
    Entry(
        term="float32",
        answer=(
            "The format float32 takes 32 bits per number and keeps about seven decimal "
            "digits. Engines use it where precision matters, as in softmax and norms."
        ),
        phrasings=(
            "What is float32?",
            "Explain float32.",
            "What does float32 mean?",
            "Where do engines use float32?",
            "How many digits does float32 keep?",
            "tell me about float32",
            "Why is softmax computed in float32?",
            "Define float32.",
        ),
        held_out="When is it worth using float32?",
    ),
    Entry(
        term="quantization",
        answer=(
            "Quantization stores weights in fewer bits, such as int8 or int4, together with "
            "scales. It saves memory and bandwidth at some cost in precision."
        ),
        phrasings=(
            "What is quantization?",
            "Explain quantization.",
            "How does quantization work?",
            "Why would I use quantization?",
            "What does quantization save?",
            "define quantization",
            "Tell me about quantization.",
            "What does it mean that a model is quantized?",
        ),
        held_out="What is the price of quantization?",
    ),
    Entry(
        term="the CUDA graph",
        answer=(
            "A CUDA graph records a sequence of kernels once and replays it with a single "
            "call. This removes most of the CPU time of small decode steps."
        ),
        phrasings=(
            "What is a CUDA graph?",
            "Explain CUDA graphs.",
            "How does a CUDA graph work?",
            "Why do engines use a CUDA graph?",
            "What does a CUDA graph record?",
            "define cuda graph",
            "Tell me about CUDA graphs.",
            "When does a CUDA graph help?",
        ),
        held_out="Which time is saved by replaying a CUDA graph?",
    ),
    Entry(
        term="the kernel launch",
        answer=(
            "A kernel launch is the call with which the CPU asks the GPU to run a kernel. "
            "Each one costs some microseconds, which adds up over many small kernels."
        ),
        phrasings=(
            "What is a kernel launch?",
            "Explain the kernel launch.",
            "What does a kernel launch cost?",
            "Why are many kernel launches slow?",
            "What happens at a kernel launch?",
            "define kernel launch",
            "Tell me about kernel launches.",
            "Who makes a kernel launch?",
        ),
        held_out="How long does a kernel launch take?",
    ),
    Entry(
        term="memory bandwidth",
        answer=(
            "Memory bandwidth is how many bytes per second can be moved between a GPU and its "
            "memory. It limits decode, where every step reads all the weights."
        ),
        phrasings=(
            "What is memory bandwidth?",
            "Explain memory bandwidth.",
            "What does memory bandwidth limit?",
            "Why does memory bandwidth matter for an LLM?",
            "How is memory bandwidth measured?",
            "define memory bandwidth",
            "Tell me about the memory bandwidth of a GPU.",
            "What is the memory bandwidth needed for?",
        ),
        held_out="Would a GPU with more memory bandwidth be faster, and why?",
    ),
    Entry(
        term="the roofline",
        answer=(
            "The roofline says that a kernel can be no faster than two limits allow: the "
            "compute speed of the GPU, and its bandwidth times operations per byte."
        ),
        phrasings=(
            "What is a roofline?",
            "Explain the roofline model.",
            "What does a roofline show?",
            "How do I read a roofline plot?",
            "Which two limits does the roofline have?",
            "define roofline",
            "Tell me about the roofline.",
            "Why is the roofline useful?",
        ),
        held_out="What can I learn about a kernel from the roofline?",
    ),
    Entry(
        term="arithmetic intensity",
        answer=(
            "Arithmetic intensity is the number of operations a kernel does per byte that it "
            "moves from or to memory. It is low in decode and high in prefill."
        ),
        phrasings=(
            "What is arithmetic intensity?",
            "Explain arithmetic intensity.",
            "How is arithmetic intensity computed?",
            "What does a low arithmetic intensity mean?",
            "Why does arithmetic intensity matter?",
            "define arithmetic intensity",
            "Tell me about arithmetic intensity.",
            "What does arithmetic intensity measure?",
        ),
        held_out="I want the arithmetic intensity of my kernel. What do I count?",
    ),
    Entry(
        term="kernel fusion",
        answer=(
            "Kernel fusion joins several operations into one kernel, so that the results "
            "between them stay on the chip instead of going to memory and back."
        ),
        phrasings=(
            "What is kernel fusion?",
            "Explain kernel fusion.",
            "Why does kernel fusion help?",
            "How does kernel fusion work?",
            "What does kernel fusion save?",
            "define kernel fusion",
            "Tell me about kernel fusion.",
            "What is a fused kernel?",
        ),
        held_out="Where do the results between operations go with kernel fusion?",
    ),
    Entry(
        term="Triton",
        answer=(
            "Triton is a language inside Python for writing GPU kernels. A program works on "
            "whole blocks of numbers, and the compiler takes care of the threads."
        ),
        phrasings=(
            "What is Triton?",
            "Explain Triton.",
            "What is Triton used for?",
            "How does Triton work?",
            "Why would I write a kernel in Triton?",
            "tell me about triton",
            "What does a Triton program work on?",
            "Define Triton.",
        ),
        held_out="In which language do I write Triton code?",
    ),
    Entry(
        term="the batch",
        answer=(
            "A batch is a set of sequences that the model computes in the same step. They "
            "share each read of the weights, so more tokens come out per second."
        ),
        phrasings=(
            "What is a batch?",
            "Explain the batch.",
            "Why do engines compute a batch?",
            "What is shared in a batch?",
            "Why is a larger batch good?",
            "what does batch size mean",
            "Tell me about batches.",
            "Define batch.",
        ),
        held_out="Why is a batch of eight not eight times slower than one sequence?",
    ),
    Entry(
        term="continuous batching",
        answer=(
            "Continuous batching lets requests join and leave at every step. When one is "
            "finished its place is free at once, and nobody waits for the slowest."
        ),
        phrasings=(
            "What is continuous batching?",
            "Explain continuous batching.",
            "How does continuous batching work?",
            "Why is continuous batching fast?",
            "What is the idea of continuous batching?",
            "define continuous batching",
            "Tell me about continuous batching.",
            "When can a request join in continuous batching?",
        ),
        held_out="What happens to a free place with continuous batching?",
    ),
    Entry(
        term="paged attention",
        answer=(
            "Paged attention reads keys and values from small blocks of the KV cache that may "
            "lie anywhere in memory. Little memory is wasted, and more requests fit."
        ),
        phrasings=(
            "What is paged attention?",
            "Explain paged attention.",
            "How does paged attention work?",
            "Why do engines use paged attention?",
            "What is a page in paged attention?",
            "define paged attention",
            "Tell me about paged attention.",
            "What problem does paged attention solve?",
        ),
        held_out="How does paged attention waste less memory?",
    ),
    Entry(
        term="the block table",
        answer=(
            "A block table lists for each sequence which blocks of the KV cache hold its "
            "tokens, in order. It is like the page table of an operating system."
        ),
        phrasings=(
            "What is a block table?",
            "Explain the block table.",
            "What does a block table list?",
            "Why does an engine need a block table?",
            "How does a block table work?",
            "define block table",
            "Tell me about the block table.",
            "What is the block table used for?",
        ),
        held_out="What can be looked up in the block table of a sequence?",
    ),
    Entry(
        term="the slot mapping",
        answer=(
            "The slot mapping gives for each token in a step the place in the KV cache where "
            "its key and value are written."
        ),
        phrasings=(
            "What is the slot mapping?",
            "Explain slot mapping.",
            "What does the slot mapping say?",
            "Why does an engine need a slot mapping?",
            "How does the slot mapping work?",
            "define slot mapping",
            "Tell me about the slot mapping.",
            "What is the slot mapping used for?",
        ),
        held_out="How does a token find its place through the slot mapping?",
    ),
    Entry(
        term="prefix caching",
        answer=(
            "Prefix caching keeps the keys and values of earlier prompts. A new request that "
            "begins with the same tokens reuses them and skips that part of its prefill."
        ),
        phrasings=(
            "What is prefix caching?",
            "Explain prefix caching.",
            "How does prefix caching work?",
            "Why does prefix caching save time?",
            "What is reused with prefix caching?",
            "define prefix caching",
            "Tell me about prefix caching.",
            "When does prefix caching help?",
        ),
        held_out="Two prompts begin with the same tokens. What does prefix caching do?",
    ),
    Entry(
        term="chunked prefill",
        answer=(
            "Chunked prefill splits a long prompt into pieces and computes them over several "
            "steps, next to the decode tokens of other requests, which need not wait."
        ),
        phrasings=(
            "What is chunked prefill?",
            "Explain chunked prefill.",
            "How does chunked prefill work?",
            "Why do engines use chunked prefill?",
            "What is a chunk in chunked prefill?",
            "define chunked prefill",
            "Tell me about chunked prefill.",
            "When is chunked prefill useful?",
        ),
        held_out="What does chunked prefill do with a very long prompt?",
    ),
    Entry(
        term="preemption",
        answer=(
            "Preemption takes a running request out of the batch when the KV cache is full. "
            "Its memory is freed, and its work is done again or restored later."
        ),
        phrasings=(
            "What is preemption?",
            "Explain preemption.",
            "When does preemption happen?",
            "Why is preemption needed?",
            "What happens to a request at preemption?",
            "define preemption",
            "Tell me about preemption.",
            "What does it mean that a request is preempted?",
        ),
        held_out="Is a request lost after preemption, or does it run again?",
    ),
    Entry(
        term="the scheduler",
        answer=(
            "The scheduler decides before every step which requests run and how many tokens "
            "each one gets, within the limits of memory and batch size."
        ),
        phrasings=(
            "What is the scheduler?",
            "Explain the scheduler.",
            "What does the scheduler decide?",
            "How does the scheduler work?",
            "Why does an engine have a scheduler?",
            "define scheduler",
            "Tell me about the scheduler.",
            "When does the scheduler run?",
        ),
        held_out="Which choices are made by the scheduler of an engine?",
    ),
    Entry(
        term="speculative decoding",
        answer=(
            "In speculative decoding a cheap draft proposes several tokens and the large "
            "model checks them in one pass. The right rule for accepting them keeps the "
            "output distribution the same."
        ),
        phrasings=(
            "What is speculative decoding?",
            "Explain speculative decoding.",
            "How does speculative decoding work?",
            "Why is speculative decoding fast?",
            "What is the draft in speculative decoding?",
            "define speculative decoding",
            "Tell me about speculative decoding.",
            "Does speculative decoding change the output?",
        ),
        held_out="Who proposes and who checks in speculative decoding?",
    ),
    Entry(
        term="tensor parallelism",
        answer=(
            "Tensor parallelism splits the weight matrices of every layer over several GPUs. "
            "Each one computes its part, and an all-reduce adds up the partial results."
        ),
        phrasings=(
            "What is tensor parallelism?",
            "Explain tensor parallelism.",
            "How does tensor parallelism work?",
            "Why would I use tensor parallelism?",
            "What is split in tensor parallelism?",
            "define tensor parallelism",
            "Tell me about tensor parallelism.",
            "When do engines need tensor parallelism?",
        ),
        held_out="How do the GPUs join their results in tensor parallelism?",
    ),
    Entry(
        term="FlashAttention",
        answer=(
            "FlashAttention computes exact attention in tiles that fit in fast memory on the "
            "chip. It never writes the full matrix of scores to GPU memory."
        ),
        phrasings=(
            "What is FlashAttention?",
            "Explain FlashAttention.",
            "How does FlashAttention work?",
            "Why is FlashAttention fast?",
            "Is FlashAttention exact?",
            "tell me about flashattention",
            "What does FlashAttention save?",
            "Define FlashAttention.",
        ),
        held_out="What does FlashAttention never write to GPU memory?",
    ),
    Entry(
        term="online softmax",
        answer=(
            "Online softmax reads the scores block by block. It keeps a running maximum and a "
            "running sum, and rescales the sum whenever the maximum grows."
        ),
        phrasings=(
            "What is online softmax?",
            "Explain online softmax.",
            "How does online softmax work?",
            "Why is online softmax useful?",
            "What does online softmax keep while it runs?",
            "define online softmax",
            "Tell me about online softmax.",
            "What is rescaled in online softmax?",
        ),
        held_out="When the maximum grows, what must online softmax do?",
    ),
    Entry(
        term="streaming",
        answer=(
            "Streaming sends each piece of the output to the user as soon as it is decoded. "
            "The total time stays the same, but the wait feels shorter."
        ),
        phrasings=(
            "What is streaming?",
            "Explain streaming.",
            "How does streaming work?",
            "Why do chat programs use streaming?",
            "What does streaming send to the user?",
            "define streaming",
            "Tell me about streaming.",
            "Does streaming make the engine faster?",
        ),
        held_out="Why does an answer with streaming feel faster?",
    ),
    Entry(
        term="the request",
        answer=(
            "A request is one prompt with its sampling settings, handed to the engine. It "
            "waits, runs and finishes, and the engine keeps its state on the way."
        ),
        phrasings=(
            "What is a request?",
            "Explain the request.",
            "What does a request contain?",
            "Which states does a request go through?",
            "What is a request in an LLM engine?",
            "define request",
            "Tell me about requests.",
            "How does an engine see a request?",
        ),
        held_out="Describe the life of a request.",
    ),
    Entry(
        term="the model runner",
        answer=(
            "The model runner prepares the input tensors of a step, calls the model and "
            "samples the next tokens. It holds the model and its KV cache."
        ),
        phrasings=(
            "What is the model runner?",
            "Explain the model runner.",
            "What does the model runner do?",
            "How does the model runner work?",
            "Why does an engine have a model runner?",
            "define model runner",
            "Tell me about the model runner.",
            "What does the model runner hold?",
        ),
        held_out="Which part of a step belongs to the model runner?",
    ),
    Entry(
        term="the executor",
        answer=(
            "The executor stands between the engine and the workers: it starts them, hands "
            "every step to them and returns their results."
        ),
        phrasings=(
            "What is the executor?",
            "Explain the executor.",
            "What does the executor do?",
            "How does the executor work?",
            "Why does an engine have an executor?",
            "define executor",
            "Tell me about the executor.",
            "Where does the executor stand?",
        ),
        held_out="To whom does the executor hand the work?",
    ),
    Entry(
        term="the worker",
        answer=(
            "A worker is in charge of one device. It sets up the GPU, loads the model onto "
            "it, finds out how much memory is free and runs the steps."
        ),
        phrasings=(
            "What is a worker?",
            "Explain the worker.",
            "What does a worker do?",
            "How many devices does a worker have?",
            "Why does an engine have workers?",
            "define worker",
            "Tell me about workers.",
            "What is a worker in charge of?",
        ),
        held_out="What does a GPU need a worker for?",
    ),
    Entry(
        term="the induction head",
        answer=(
            "An induction head looks for an earlier copy of the current token and attends to "
            "the token that came after it. It lets a model continue repeated patterns."
        ),
        phrasings=(
            "What is an induction head?",
            "Explain induction heads.",
            "How does an induction head work?",
            "What does an induction head look for?",
            "Why are induction heads useful?",
            "define induction head",
            "Tell me about induction heads.",
            "How does an induction head copy a sequence?",
        ),
        held_out="What can a model do thanks to an induction head?",
    ),
    Entry(
        term="Qwen3",
        answer=(
            "Qwen3 is a family of open language models from Alibaba. The dense ones have "
            "grouped-query attention, q/k norm, RoPE, RMSNorm and SwiGLU."
        ),
        phrasings=(
            "What is Qwen3?",
            "Explain Qwen3.",
            "Who made Qwen3?",
            "How is Qwen3 built?",
            "What are the parts of the Qwen3 architecture?",
            "tell me about qwen3",
            "Which company is behind Qwen3?",
            "Describe the Qwen3 models.",
        ),
        held_out="What kind of model is Qwen3, and who is it from?",
    ),
    Entry(
        term="Qwen2.5",
        answer=(
            "Qwen2.5 is the model family before Qwen3. Its layers are much the same, but the "
            "query, key and value projections have a bias and there is no q/k norm."
        ),
        phrasings=(
            "What is Qwen2.5?",
            "Explain Qwen2.5.",
            "How does Qwen2.5 differ from its successor?",
            "What is special in the layers of Qwen2.5?",
            "Does Qwen2.5 have a bias?",
            "tell me about qwen2.5",
            "Which projections of Qwen2.5 have a bias?",
            "Describe the Qwen2.5 models.",
        ),
        held_out="What should I know about Qwen2.5 before I load it?",
    ),
    Entry(
        term="the parity test",
        answer=(
            "A parity test gives the same weights and inputs to two implementations and "
            "checks that their outputs agree within a small tolerance. It finds mistakes in a "
            "rewrite."
        ),
        phrasings=(
            "What is a parity test?",
            "Explain the parity test.",
            "How does a parity test work?",
            "Why do we write parity tests?",
            "What does a parity test compare?",
            "define parity test",
            "Tell me about parity tests.",
            "When does a parity test fail?",
        ),
        held_out="After a rewrite, why should I run a parity test?",
    ),
    Entry(
        term="Hugging Face generate",
        answer=(
            "The generate method of Hugging Face transformers produces text with almost any "
            "model of the library. It is easy to use and serves as a baseline for faster "
            "engines."
        ),
        phrasings=(
            "What is Hugging Face generate?",
            "Explain the generate method of Hugging Face.",
            "What does Hugging Face generate do?",
            "Why do we compare an engine with Hugging Face generate?",
            "What can I produce with Hugging Face generate?",
            "tell me about hugging face generate",
            "What is the Hugging Face generate method good for?",
            "Describe Hugging Face generate.",
        ),
        held_out="Why is Hugging Face generate a good baseline?",
    ),
    Entry(
        term="vLLM",
        answer=(
            "vLLM is an open source engine for serving language models to many users. It "
            "became known for paged attention and uses continuous batching."
        ),
        phrasings=(
            "What is vLLM?",
            "Explain vLLM.",
            "What is vLLM known for?",
            "Why is vLLM fast?",
            "What can I do with vLLM?",
            "tell me about vllm",
            "What kind of program is vLLM?",
            "Describe vLLM.",
        ),
        held_out="For which ideas did vLLM become known?",
    ),
    Entry(
        term="nano-vllm",
        answer=(
            "nano-vllm is a small engine of little more than a thousand lines of Python. It "
            "follows the design of vLLM, so that the main ideas are easy to read."
        ),
        phrasings=(
            "What is nano-vllm?",
            "Explain nano-vllm.",
            "How large is nano-vllm?",
            "Why was nano-vllm written?",
            "What can I learn from nano-vllm?",
            "tell me about nano-vllm",
            "How many lines does nano-vllm have?",
            "Describe nano-vllm.",
        ),
        held_out="Is nano-vllm small enough to read?",
    ),
    Entry(
        term="FoloVLLM",
        answer=(
            "FoloVLLM is a course that builds an inference engine for Qwen3 from nothing. "
            "Each notebook teaches one thing and exports it as one module."
        ),
        phrasings=(
            "What is FoloVLLM?",
            "Explain FoloVLLM.",
            "What does FoloVLLM build?",
            "What do I learn in FoloVLLM?",
            "How is the FoloVLLM course made?",
            "tell me about folovllm",
            "What is in a notebook of FoloVLLM?",
            "Describe FoloVLLM.",
        ),
        held_out="I found a course named FoloVLLM. What is it about?",
    ),
    Entry(
        term="the tiny model",
        answer=(
            "The tiny model is a Qwen3 in miniature with 4.5 million parameters. It tells "
            "short stories, answers questions about inference engines and copies sequences."
        ),
        phrasings=(
            "What is the tiny model?",
            "Explain the tiny model.",
            "What can the tiny model do?",
            "How large is the tiny model?",
            "Who are you?",
            "tell me about the tiny model",
            "How many parameters does the tiny model have?",
            "Describe the tiny model.",
        ),
        held_out="What was the tiny model trained to do?",
    ),
)
